"""A model of lm-evaluation-harness that is any of our runtimes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mka_export.errors import UnsupportedError
from mka_export.parity.harness.frame import Frame
from mka_export.parity.runtimes import LogProbs, Runtime
from mka_export.progress import Progress

BATCH_TOKENS = 8192  # through the layers of a checkpoint at a time
PADDING = 0.1  # of a batch at most: the runtimes that take window by window compute it in vain
ROLLING = 2048  # tokens of a rolling window at most: all their log-probabilities are in memory
NEW_TOKENS = 256  # where a task does not say how many, as in the harness
FIRST_TOKENS = 16  # generated before the stop strings are looked for; then twice as many

Ids = tuple[int, ...]
LogLikelihood = tuple[float, bool]  # of the continuation, in nats; whether it is what greedy decoding gives


class RuntimeLM(TemplateLM):  # type: ignore[misc]  # the package has no types
    """A runtime as the harness wants it: log-likelihoods, whole or rolling, and greedy generation.

    Text becomes ids as in the harness's own ``hf`` backend: BOS where the tokenizer puts one, context and continuation
    encoded together, what is longer than the model's context cut off on the left.

    Args:
        runtime: the model.
        frame: what stands before its texts, and how long they may be.
        progress: where the requests are counted.

    Attributes:
        tokens: how many tokens were evaluated, padding not counted.
    """

    def __init__(self, runtime: Runtime, frame: Frame, progress: Progress) -> None:
        super().__init__()
        self.tokens = 0
        self._runtime, self._frame, self._progress = runtime, frame, progress

    @property
    def eot_token_id(self) -> int:
        """The id that a text without a context is predicted from."""
        return self._frame.prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Turn text into ids, BOS before them where the tokenizer puts one, and the text has none."""
        ids, leading = self._runtime.tokenize(string), self._frame.leading
        return ids if leading is None or add_special_tokens is False or ids[:1] == [leading] else [leading, *ids]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, in nats; one longer than the context goes in pieces."""
        windows = [
            [
                (None, *make_disjoint_window(pair))
                for pair in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=min(self._frame.context, ROLLING),
                    context_len=1,
                )
            ]
            for request in requests
        ]
        found = iter(self._loglikelihood_tokens([window for text in windows for window in text]))
        return [sum(next(found)[0] for _ in text) for text in windows]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context greedily, up to the first of its stop strings (not returned).

        Raises:
            UnsupportedError: a task wants to sample, or more tokens than the model's context has.
        """
        with self._progress.task("generating", len(requests)) as task:
            found = []
            for context, settings in (request.args for request in requests):
                found.append(self._continue(context, normalize_gen_kwargs(settings, NEW_TOKENS)))
                task.advance()
            return found

    def _continue(self, context: str, settings: Mapping[str, Any]) -> str:
        if settings["do_sample"]:
            raise UnsupportedError("the task samples, and only greedy generation is done here", "Choose another task.")
        most, stops = settings["max_gen_toks"], [stop for stop in settings["until"] if stop]
        if (room := self._frame.context - most) <= 0:
            raise UnsupportedError(
                f"the task generates up to {most} tokens, and the model's context has {self._frame.context}",
                "Choose another task.",
            )
        prompt = self.tok_encode(context)[-room:] or [self._frame.prefix]
        new: list[int] = []
        budget = min(FIRST_TOKENS, most)
        while True:
            (more,) = self._runtime.generate([[*prompt, *new]], budget)
            self.tokens += len(prompt) + len(new) + len(more)
            new += more
            text = self._runtime.detokenize(new) if new else ""
            ends = [text.find(stop) for stop in stops if stop in text]
            if ends or len(more) < budget or len(new) >= most:
                return text[: min(ends, default=len(text))]
            budget = min(len(new), most - len(new))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[object, list[int], list[int]]], disable_tqdm: bool = False, **_: object
    ) -> list[LogLikelihood]:
        """Return the log-likelihood of each continuation: requests are (anything, context's ids, continuation's ids).

        Requests that differ in the last token only, as the letters of a multiple choice, are one pass.
        """
        found: list[LogLikelihood] = [(0.0, True)] * len(requests)  # of an empty continuation
        sharing: dict[Ids, list[int]] = {}
        for i, (_anything, context, continuation) in enumerate(requests):
            if len(continuation) > self._frame.context:
                raise UnsupportedError(
                    f"a continuation of {len(continuation)} tokens is longer than the model's context of "
                    f"{self._frame.context}",
                    "Choose another task.",
                )
            if continuation:
                sharing.setdefault(tuple([*context, *continuation][-self._frame.context - 1 : -1]), []).append(i)
        with self._progress.task("log-likelihoods", len(requests)) as task:
            for ids, rows in self._rows(sharing):
                for i in sharing[ids]:
                    found[i] = _likelihood(rows, requests[i][2])
                task.advance(len(sharing[ids]))
        return found

    def _rows(self, windows: Iterable[Ids]) -> Iterator[tuple[Ids, LogProbs]]:
        """Yield each window with the log-probabilities after each of its tokens (tokens, vocabulary), longest first."""
        for batch in _batches(sorted(windows, key=len, reverse=True)):
            # Padding goes on the right, where a causal model does not see it.
            padded = np.zeros((len(batch), len(batch[0])), dtype=np.int64)
            for row, ids in zip(padded, batch, strict=True):
                row[: len(ids)] = ids
            for ids, rows in zip(batch, self._runtime.log_probs(padded), strict=True):
                self.tokens += len(ids)
                yield ids, rows[: len(ids)]


def _batches(windows: Sequence[Ids]) -> Iterator[list[Ids]]:
    """Cut windows, longest first, into batches that are as good as filled when padded to their first."""
    batch: list[Ids] = []
    for ids in windows:
        if batch and ((len(batch) + 1) * len(batch[0]) > BATCH_TOKENS or len(ids) < (1 - PADDING) * len(batch[0])):
            yield batch
            batch = []
        batch.append(ids)
    if batch:
        yield batch


def _likelihood(rows: LogProbs, continuation: Sequence[int]) -> LogLikelihood:
    rows = rows[-len(continuation) :]
    chosen = rows[np.arange(len(rows)), continuation]
    return float(chosen.sum(dtype=np.float64)), bool((rows.argmax(axis=1) == continuation).all())
