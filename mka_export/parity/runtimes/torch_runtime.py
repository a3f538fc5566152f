"""torch, through the layer runner: checkpoints of any size, in float32, a layer in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mka_export.errors import RuntimeFailure
from mka_export.models.checkpoint import Checkpoint, read_json
from mka_export.models.runner import LayerRunner
from mka_export.models.tokenizer import load_tokenizer, text_ids
from mka_export.parity.runtimes import LogProbs, Windows
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

    Raises:
        CheckpointError: the checkpoint or its tokenizer is damaged.
        UnsupportedError: it is of an unknown family.
        UsageError: the device is not there.
    """

    name = "torch"

    def __init__(self, path: Path, *, device: str = "cpu", progress: Progress | None = None) -> None:
        checkpoint = Checkpoint.open(path)
        self._runner = LayerRunner(checkpoint, device)
        self._tokenizer = load_tokenizer(path)
        self._progress = progress
        self._ends = _end_ids(checkpoint, self._tokenizer.eos_token_id)
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

        All windows go through all layers in this call, each layer being read once; the iterator it returns
        applies only the head. The last windows' states are kept: several artifacts are compared with one model.
        """
        if self._last is None or not np.array_equal(self._last[0], windows):
            self._last = windows, self._runner.hidden_states(torch.from_numpy(windows), self._progress)
        return (self._window(window) for window in self._last[1])

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Continue each prompt greedily, up to a token that config or tokenizer call the end of a text.

        All prompts run together, padded on the right, where a causal model does not see it; every new token
        is a whole pass, so that no key-value cache is held.
        """
        if not all(prompts):
            raise RuntimeFailure("a prompt has no tokens", "Give at least one.")
        texts = [list(prompt) for prompt in prompts]
        running = list(range(len(texts)))
        for _ in range(max_new_tokens):
            if not running:
                break
            tokens = self._next([texts[i] for i in running])
            ended = {i for i, token in zip(running, tokens, strict=True) if token in self._ends}
            for i, token in zip(running, tokens, strict=True):
                if i not in ended:
                    texts[i].append(token)
            running = [i for i in running if i not in ended]
        return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]

    def close(self) -> None:
        """Let go of the states."""
        self._last = None

    def _next(self, texts: Sequence[Sequence[int]]) -> list[int]:
        length = max(map(len, texts))
        ids = torch.tensor([[*text, *[0] * (length - len(text))] for text in texts])
        states = self._runner.hidden_states(ids)
        last = torch.stack([states[i, len(text) - 1] for i, text in enumerate(texts)])
        return [int(token) for token in self._runner.logits(last).argmax(-1)]

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


def _end_ids(checkpoint: Checkpoint, tokenizer_end: int | None) -> set[int]:
    """Return every id that config, generation config or tokenizer name as the end of a text."""
    generation = checkpoint.path / "generation_config.json"
    named = [tokenizer_end, checkpoint.config.get("eos_token_id")]
    if generation.is_file():
        named.append(read_json(generation).get("eos_token_id"))
    return {i for entry in named for i in (entry if isinstance(entry, list) else [entry]) if isinstance(i, int)}
