"""torch, through the layer runner: checkpoints of any size, in float32, a layer in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mka_export.errors import RuntimeFailure
from mka_export.models.chat import Conversation, Rendered, render_apart, template_of
from mka_export.models.checkpoint import Checkpoint, read_json
from mka_export.models.prefixed import last_states, rest_states
from mka_export.models.runner import LayerRunner
from mka_export.models.tokenizer import load_tokenizer, text_ids
from mka_export.parity.runtimes import LogProbs, Prefixed, Windows
from mka_export.progress import Progress

ROWS = 128  # positions normalised at a time


class TorchRuntime:
    """A checkpoint, run layer by layer: the reference that artifacts are compared with.

    ``tokenize`` is the checkpoint's own tokenizer without BOS and EOS, special tokens parsed. A SentencePiece
    tokenizer that puts a space before every text does so here too, as llama.cpp does.

    Args:
        path: the checkpoint's folder.
        device: as for ``LayerRunner``.
        progress: where a pass over the layers is shown.
        model: what it is called there; the folder's name by default.

    Raises:
        CheckpointError: the checkpoint or its tokenizer is damaged.
        UnsupportedError: it is of an unknown family.
        UsageError: the device is not there.
    """

    name = "torch"

    def __init__(
        self, path: Path, *, device: str = "cpu", progress: Progress | None = None, model: str | None = None
    ) -> None:
        checkpoint = Checkpoint.open(path)
        self._runner = LayerRunner(checkpoint, device, model)
        self._tokenizer = load_tokenizer(path)
        self._path, self._progress = path, progress
        self.ends = _end_ids(checkpoint, self._tokenizer.eos_token_id)
        self._last: tuple[Windows, Tensor] | None = None
        self.device = str(self._runner.device)
        self.vocab_size = checkpoint.vocab_size

    def tokenize(self, text: str) -> list[int]:
        """Turn text into ids; see the class for what comes before the text."""
        return text_ids(self._tokenizer, text)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Turn ids into text, special tokens spelled out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def log_probs(self, windows: Windows) -> Iterator[LogProbs]:
        """Yield, window by window, (tokens, vocabulary) log-probabilities; row t is for token t + 1.

        See ``run``: the iterator that is returned applies only the head.
        """
        return (self._window(states) for states in self.run(windows))

    def run(self, windows: Windows) -> Tensor:
        """Pass windows through all layers, each layer being read once: (windows, tokens, hidden).

        The last windows' states are kept: several artifacts are compared with one model.
        """
        if self._last is None or not np.array_equal(self._last[0], windows):
            self._last = windows, self._runner.hidden_states(torch.from_numpy(windows), self._progress)
        return self._last[1]

    def next_log_probs(self, texts: Sequence[Prefixed], tokens: Sequence[int]) -> Iterator[LogProbs]:
        """Yield the log-probabilities of ``tokens`` right after each text, a group at a time: (rests, tokens).

        Each layer is read once for as many groups as ``models.prefixed`` holds states of.
        """
        groups = [(text.prefix, text.rests) for text in texts]
        for states in last_states(self._runner, groups, self._progress or Progress(quiet=True)):
            for rows in torch.split(states, ROWS):
                yield self._window(rows)[:, list(tokens)]

    def rest_log_probs(self, texts: Sequence[Prefixed]) -> Iterator[LogProbs]:
        """Yield, text by text, (tokens, vocabulary) log-probabilities of how it goes on; each layer is read as above."""
        groups = [(text.prefix, text.rests) for text in texts]
        for rests in rest_states(self._runner, groups, self._progress or Progress(quiet=True)):
            for states in rests:
                yield self._window(states)

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, drafts: Sequence[Sequence[int]] | None = None
    ) -> list[list[int]]:
        """Continue each prompt greedily, up to a token that config or tokenizer call the end of a text.

        All prompts run together, padded on the right, where a causal model does not see it, and no key-value cache
        is held. So a new token takes a whole pass over the layers, unless ``drafts`` guess it: one continuation for
        each prompt, of which a pass confirms as many tokens as are right, and finds the next (speculative decoding,
        arXiv 2211.17192, greedily). They change how long it takes and not what comes out.
        """
        if not all(prompts):
            raise RuntimeFailure("a prompt has no tokens", "Give at least one.")
        new: list[list[int]] = [[] for _ in prompts]
        running = set(range(len(prompts))) if max_new_tokens else set()
        while running:
            guesses = {
                i: self._known(drafts[i][len(new[i]) : max_new_tokens - 1] if drafts else ()) for i in sorted(running)
            }
            found = self._next({i: [*prompts[i], *new[i]] for i in guesses}, guesses)
            for i, guess in guesses.items():
                for token, guessed in zip(found[i], [*guess, None], strict=True):
                    if token in self.ends:
                        running.remove(i)
                        break
                    new[i].append(token)
                    if token != guessed:
                        break
                if len(new[i]) == max_new_tokens:
                    running.discard(i)
        return new

    def render_chats(self, conversations: Sequence[Conversation]) -> list[Rendered] | None:
        """Render conversations by the checkpoint's template, in a process of its own."""
        template, special = template_of(self._tokenizer), self._tokenizer.special_tokens_map
        return render_apart(self._path.name, template, special, conversations) if template else None

    def close(self) -> None:
        """Let go of the states."""
        self._last = None

    def _next(self, texts: Mapping[int, list[int]], guesses: Mapping[int, list[int]]) -> dict[int, list[int]]:
        """Return what comes after each text, and after each token of the guess behind it."""
        rows = [[*text, *guesses[i]] for i, text in texts.items()]
        length = max(map(len, rows))
        states = self._runner.hidden_states(torch.tensor([[*row, *[0] * (length - len(row))] for row in rows]))
        wanted = [
            row[len(text) - 1 : len(text) + len(guesses[i])]
            for row, (i, text) in zip(states, texts.items(), strict=True)
        ]
        tokens = iter(self._runner.logits(torch.cat(wanted)).argmax(-1).tolist())
        return {i: list(islice(tokens, len(each))) for i, each in zip(texts, wanted, strict=True)}

    def _known(self, ids: Sequence[int]) -> list[int]:
        """Return ``ids`` up to the first that this model has not."""
        return list(takewhile(lambda token: 0 <= token < self.vocab_size, ids))

    def _window(self, states: Tensor) -> LogProbs:
        out = self._runner.logits(states)
        for start in range(0, len(out), ROWS):  # in place: a whole window of logits is big enough once
            rows = out[start : start + ROWS]
            rows -= torch.logsumexp(rows, dim=-1, keepdim=True)
        log_probs: LogProbs = out.cpu().numpy()
        return log_probs


def open_runtime(path: Path, *, device: str = "cpu", progress: Progress | None = None) -> TorchRuntime:
    """Open a checkpoint; arguments and errors are those of ``TorchRuntime``."""
    return TorchRuntime(path, device=device, progress=progress)


def devices() -> list[str]:
    """Return where torch can compute."""
    cuda = [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    return [f"cpu ({torch.get_num_threads()} threads)", *cuda]


def _end_ids(checkpoint: Checkpoint, tokenizer_end: int | None) -> frozenset[int]:
    """Return every id that config, generation config or tokenizer name as the end of a text."""
    generation = checkpoint.path / "generation_config.json"
    named = [tokenizer_end, checkpoint.config.get("eos_token_id")]
    if generation.is_file():
        named.append(read_json(generation).get("eos_token_id"))
    return frozenset(
        i for entry in named for i in (entry if isinstance(entry, list) else [entry]) if isinstance(i, int)
    )
