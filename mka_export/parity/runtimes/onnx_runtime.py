"""ONNX Runtime: the graph alone, as an app on a phone that brings its own tokenizer and loop runs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from mka_export.errors import RuntimeFailure
from mka_export.models.chat import Conversation, Rendered, render, template_of
from mka_export.parity.runtimes import Ids, LogProbs, Prefixed, Windows
from mka_export.parity.runtimes.logits import BATCH, log_softmax, require_known, require_tokens, usable_cores
from mka_export.parity.runtimes.onnx_folder import OnnxFolder

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

Cache = dict[str, NDArray[Any]]  # name of a graph's input -> (1, heads, tokens, width)


class OnnxRuntime:
    """A folder's graph in ONNX Runtime.

    The key-value cache that the graph gives back goes in again with the next tokens; a window goes through in pieces of
    ``BATCH`` tokens. ``tokenize`` is the tokenizer in the folder without BOS and EOS, special tokens parsed.

    Args:
        path: the folder.
        device: ``cpu``, ``cuda`` where onnxruntime-gpu is installed, or ``auto`` for that where it is.
        threads: CPU threads; by default as many as this process may use.

    Raises:
        RuntimeFailure: the folder is damaged, or ONNX Runtime cannot load the graph.
    """

    name = "onnxruntime"

    def __init__(self, path: Path, *, device: str = "cpu", threads: int | None = None) -> None:
        self._folder = OnnxFolder.open(path)
        if device == "auto":
            device = devices()[-1]
        self.vocab_size, self.device, self.ends = self._folder.vocab_size, device, self._folder.ends
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or usable_cores()
        options.log_severity_level = 3  # errors
        provider = PROVIDERS.get(device.partition(":")[0])
        if provider not in onnxruntime.get_available_providers():
            raise RuntimeFailure(
                f"this onnxruntime cannot compute on {device}", "Install onnxruntime-gpu, or use the CPU."
            )
        try:
            self._session = onnxruntime.InferenceSession(self._folder.graph, options, providers=[provider])
        except Exception as error:  # its exceptions share no class
            raise RuntimeFailure(f"ONNX Runtime cannot load {self._folder.graph}: {error}", "Make it anew.") from error
        self._empty = {
            each.name: np.zeros((1, each.shape[1], 0, each.shape[3]), DTYPES[each.type])
            for each in self._session.get_inputs()
            if each.name.startswith("past_key_values.")
        }
        self._outputs = ["logits", *(name.replace("past_key_values", "present") for name in self._empty)]

    def tokenize(self, text: str) -> list[int]:
        """Turn text into ids; see the class."""
        return self._folder.tokenize(text)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Turn ids into text, special tokens spelled out."""
        return self._folder.detokenize(ids)

    def log_probs(self, windows: Windows) -> Iterator[LogProbs]:
        """Yield, window by window, (tokens, vocabulary) log-probabilities; row t is for token t + 1."""
        for window in windows:
            yield self._rows(window, 0, self._empty)

    def next_log_probs(self, texts: Sequence[Prefixed], tokens: Sequence[int]) -> Iterator[LogProbs]:
        """Yield the log-probabilities (1, tokens) of ``tokens`` right after each text.

        One text at a time: the CPU's GroupQueryAttention takes no batch of several tokens each behind a past.
        """
        for text in texts:
            cache = self._after(text.prefix)
            for rest in text.rests:
                logits, _ = self._run(np.array(rest, dtype=np.int64), len(text.prefix), cache)
                last = logits[-1:]
                log_softmax(last)
                yield last[:, list(tokens)]

    def rest_log_probs(self, texts: Sequence[Prefixed]) -> Iterator[LogProbs]:
        """Yield, text by text, (tokens, vocabulary) log-probabilities of how it goes on behind the cache of its prefix."""
        for text in texts:
            cache = self._after(text.prefix)
            for rest in text.rests:
                yield self._rows(np.array(rest, dtype=np.int64), len(text.prefix), cache)

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Continue each prompt greedily, up to a token that the folder names as the end of a text."""
        return [self._continue(np.asarray(prompt, dtype=np.int64), max_new_tokens) for prompt in prompts]

    def render_chats(self, conversations: Sequence[Conversation]) -> list[Rendered] | None:
        """Render conversations by the template in the folder."""
        tokenizer = self._folder.tokenizer
        template = template_of(tokenizer)
        return render(template, tokenizer.special_tokens_map, conversations) if template else None

    def close(self) -> None:
        """Free the model."""
        del self._session

    def _continue(self, prompt: NDArray[np.int64], max_new_tokens: int) -> list[int]:
        require_tokens(prompt)
        new: list[int] = []
        logits, cache = self._run(prompt, 0, self._empty)
        while len(new) < max_new_tokens and (token := int(logits[-1].argmax())) not in self.ends:
            new.append(token)
            if len(new) < max_new_tokens:
                logits, cache = self._run(np.array([token]), len(prompt) + len(new) - 1, cache)
        return new

    def _after(self, prefix: Ids) -> Cache:
        """Return the cache with a prefix in it."""
        ids, cache = np.array(prefix, dtype=np.int64), self._empty
        for start in range(0, len(ids), BATCH):
            _, cache = self._run(ids[start : start + BATCH], start, cache)
        return cache

    def _rows(self, ids: NDArray[np.int64], position: int, cache: Cache) -> LogProbs:
        """Run ``ids`` from ``position`` on, in pieces; returns log-probabilities (tokens, vocabulary)."""
        out = np.empty((len(ids), self.vocab_size), dtype=np.float32)
        for start in range(0, len(ids), BATCH):
            part = slice(start, start + BATCH)
            out[part], cache = self._run(ids[part], position + start, cache)
            log_softmax(out[part])
        return out

    def _run(self, ids: NDArray[np.int64], position: int, cache: Cache) -> tuple[NDArray[np.float32], Cache]:
        """Run ``ids`` from ``position`` on; returns logits (tokens, vocabulary) and the cache with them."""
        require_known(ids, self.vocab_size, self._folder.path)
        mask = np.ones((1, position + len(ids)), dtype=np.int64)
        try:
            logits, *present = self._session.run(
                self._outputs, {"input_ids": ids[None].astype(np.int64), "attention_mask": mask, **cache}
            )
        except Exception as error:  # its exceptions share no class
            raise RuntimeFailure(f"ONNX Runtime cannot run {self._folder.graph}: {error}") from error
        return logits[0].astype(np.float32), dict(zip(self._empty, present, strict=True))


def open_runtime(path: Path, *, device: str = "cpu", threads: int | None = None) -> OnnxRuntime:
    """Open a folder; arguments and errors are those of ``OnnxRuntime``."""
    return OnnxRuntime(path, device=device, threads=threads)


def devices() -> list[str]:
    """Return where ONNX Runtime can compute, the fastest last."""
    found = onnxruntime.get_available_providers()
    return [device for device, provider in PROVIDERS.items() if provider in found]
