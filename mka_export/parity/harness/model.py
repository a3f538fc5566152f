"""A model of lm-evaluation-harness that is any of our runtimes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from numpy.typing import NDArray

from mka_export.errors import UnsupportedError
from mka_export.parity.harness.frame import Frame
from mka_export.parity.runtimes import Ids, LogProbs, Prefixed, Runtime
from mka_export.progress import Progress
from mka_export.publish import save_array, seal, sealed

ROLLING = 2048  # tokens of a rolling window at most: all their log-probabilities are in memory
NEW_TOKENS = 256  # where a task does not say how many, as in the harness
FIRST_TOKENS = 16  # generated before the stop strings are looked for; then twice as many

PIECE = 64  # questions whose answers are kept together: what is lost when the work is killed

Item = TypeVar("Item")
LogLikelihood = tuple[float, bool]  # of the continuation, in nats; whether it is what greedy decoding gives


class RuntimeLM(TemplateLM):  # type: ignore[misc]  # the package has no types
    """A runtime as the harness wants it: log-likelihoods, whole or rolling, and greedy generation.

    Text becomes ids as in the harness's own ``hf`` backend: BOS where the tokenizer puts one, context and continuation
    encoded together, what is longer than the model's context cut off on the left.

    Args:
        runtime: the model.
        frame: what stands before its texts, and how long they may be.
        pieces: a folder where finished answers are kept, to go on from when the work was killed.
        progress: where they are counted.

    Attributes:
        tokens: how many were evaluated.
    """

    def __init__(self, runtime: Runtime, frame: Frame, pieces: Path, progress: Progress) -> None:
        super().__init__()
        self.tokens = 0
        self._runtime, self._frame, self._pieces, self._progress = runtime, frame, pieces, progress
        self._calls = 0

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
        asked = [
            (context, normalize_gen_kwargs(settings, NEW_TOKENS)) for context, settings in (r.args for r in requests)
        ]
        texts = self._kept(
            "generating", asked, lambda some: np.array([self._continue(*each) for each in some], dtype=str)
        )
        return [str(text) for text in texts]

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

        What the choices of a question begin with goes through the model once; those that differ in the last token only, as
        letters do, are one pass.
        """
        found: list[LogLikelihood] = [(0.0, True)] * len(requests)  # of an empty continuation
        asked: dict[Ids, dict[Ids, list[int]]] = {}  # how texts begin -> how they go on -> the requests
        for i, (_anything, context, continuation) in enumerate(requests):
            if len(continuation) > self._frame.context:
                raise UnsupportedError(
                    f"a continuation of {len(continuation)} tokens is longer than the model's context of "
                    f"{self._frame.context}",
                    "Choose another task.",
                )
            if continuation:
                ids = tuple([*context, *continuation][-self._frame.context - 1 : -1])
                start = len(ids) - len(continuation)
                asked.setdefault(ids[:start], {}).setdefault(ids[start:], []).append(i)
        texts = [Prefixed(prefix, tuple(rests)) for prefix, rests in asked.items()]
        texts.sort(key=_longest, reverse=True)  # what a runtime makes room for once does for the others

        def answer(some: Sequence[Prefixed]) -> NDArray[np.float64]:
            rows = self._runtime.rest_log_probs(some)
            self.tokens += sum(len(text.prefix) + sum(map(len, text.rests)) for text in some)
            return np.array(
                [
                    _likelihood(after, requests[i][2])
                    for text in some
                    for rest, after in zip(text.rests, rows, strict=False)
                    for i in asked[text.prefix][rest]
                ]
            )

        order = [i for text in texts for rest in text.rests for i in asked[text.prefix][rest]]
        for i, (likelihood, greedy) in zip(order, self._kept("log-likelihoods", texts, answer), strict=True):
            found[i] = float(likelihood), bool(greedy)
        return found

    def _kept(self, what: str, items: Sequence[Item], answer: Callable[[Sequence[Item]], NDArray[Any]]) -> list[Any]:
        """Return the answers to ``items``, of which an earlier run, that was killed, has kept some."""
        self._calls += 1
        found: list[Any] = []
        with self._progress.task(what, len(items)) as task:
            for start in range(0, len(items), PIECE):
                some, piece = items[start : start + PIECE], self._pieces / f"{what}-{self._calls}-{start}.npy"
                if sealed(piece) is None:
                    save_array(piece, answer(some))
                    seal(piece, {})
                found += [*np.load(piece)]
                task.advance(len(some))
        return found


def _longest(text: Prefixed) -> int:
    return len(text.prefix) + max(map(len, text.rests))


def _likelihood(rows: LogProbs, continuation: Sequence[int]) -> LogLikelihood:
    """Return what ``rows`` (tokens, vocabulary) say of a continuation, whose first token comes after the first row's."""
    chosen = rows[np.arange(len(rows)), continuation]
    return float(chosen.sum(dtype=np.float64)), bool((rows.argmax(axis=1) == continuation).all())
