"""onnxruntime-genai: the folder as the library of Android, iOS and desktop apps opens it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai
from numpy.typing import NDArray

from mka_export.errors import RuntimeFailure
from mka_export.models.chat import Conversation, Rendered, template_of
from mka_export.parity.runtimes import LogProbs, Prefixed, Windows
from mka_export.parity.runtimes.logits import BATCH, log_softmax, require_known, require_tokens
from mka_export.parity.runtimes.onnx_folder import OnnxFolder


class GenaiRuntime:
    """A folder in onnxruntime-genai, with its tokenizer and its generator.

    Args:
        path: the folder.

    Raises:
        RuntimeFailure: the folder is damaged, or the library cannot load it.
    """

    name = "onnxruntime-genai"
    device = "cpu"

    def __init__(self, path: Path) -> None:
        folder = OnnxFolder.open(path)
        self.vocab_size, self._path, self.ends = folder.vocab_size, path, folder.ends
        self._has_template = template_of(folder.tokenizer) is not None
        try:
            self._model = genai.Model(str(path))
            self._tokenizer = genai.Tokenizer(self._model)
        except Exception as error:  # its exceptions share no class
            raise RuntimeFailure(f"onnxruntime-genai cannot load {path}: {error}", "Make it anew.") from error

    def tokenize(self, text: str) -> list[int]:
        """Turn text into ids by the library's own tokenizer."""
        return [int(i) for i in self._tokenizer.encode(text)]

    def detokenize(self, ids: Sequence[int]) -> str:
        """Turn ids into text by the library's own tokenizer."""
        return str(self._tokenizer.decode(np.asarray(ids, dtype=np.int32)))

    def log_probs(self, windows: Windows) -> Iterator[LogProbs]:
        """Yield, window by window, (tokens, vocabulary) log-probabilities; row t is for token t + 1."""
        for window in windows:
            yield self._rows(self._generator(len(window)), window)

    def next_log_probs(self, texts: Sequence[Prefixed], tokens: Sequence[int]) -> Iterator[LogProbs]:
        """Yield the log-probabilities (1, tokens) of ``tokens`` right after each text.

        The generator is taken back to the prefix after each.
        """
        for text in texts:
            generator = self._after(text)
            for rest in text.rests:
                last = self._append(generator, np.array(rest, dtype=np.int64))[-1:]
                log_softmax(last)
                yield last[:, list(tokens)]
                generator.rewind_to(len(text.prefix))

    def rest_log_probs(self, texts: Sequence[Prefixed]) -> Iterator[LogProbs]:
        """Yield, text by text, (tokens, vocabulary) log-probabilities of how it goes on.

        The generator is taken back to the prefix after each.
        """
        for text in texts:
            generator = self._after(text)
            for rest in text.rests:
                yield self._rows(generator, np.array(rest, dtype=np.int64))
                generator.rewind_to(len(text.prefix))

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Continue each prompt greedily, up to a token that the folder names as the end of a text."""
        return [self._continue(prompt, max_new_tokens) for prompt in prompts]

    def render_chats(self, conversations: Sequence[Conversation]) -> list[Rendered] | None:
        """Render conversations by the template in the folder, as the library's own engine understands it."""
        return [self._render(each) for each in conversations] if self._has_template else None

    def close(self) -> None:
        """Free the model."""
        del self._tokenizer, self._model

    def _continue(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        require_tokens(prompt)
        generator = self._generator(len(prompt) + max_new_tokens)
        new: list[int] = []
        generator.append_tokens(np.asarray(prompt, dtype=np.int32))
        while len(new) < max_new_tokens:
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if token in self.ends:
                break
            new.append(token)
        return new

    def _render(self, conversation: Conversation) -> Rendered:
        try:
            return Rendered(self._tokenizer.apply_chat_template(json.dumps(conversation), add_generation_prompt=True))
        except Exception as error:  # its exceptions share no class
            return Rendered.refused(error)

    def _after(self, text: Prefixed) -> genai.Generator:
        """Return a generator that has read a prefix, with room for how the texts go on."""
        generator = self._generator(len(text.prefix) + max(map(len, text.rests)))
        prefix = np.array(text.prefix, dtype=np.int64)
        for start in range(0, len(prefix), BATCH):
            self._append(generator, prefix[start : start + BATCH])
        return generator

    def _rows(self, generator: genai.Generator, ids: NDArray[np.int64]) -> LogProbs:
        """Let a generator read ``ids``, in pieces; returns log-probabilities (tokens, vocabulary)."""
        out = np.empty((len(ids), self.vocab_size), dtype=np.float32)
        for start in range(0, len(ids), BATCH):
            part = slice(start, start + BATCH)
            out[part] = self._append(generator, ids[part])
            log_softmax(out[part])
        return out

    def _generator(self, tokens: int) -> genai.Generator:
        params = genai.GeneratorParams(self._model)
        params.set_search_options(max_length=tokens, do_sample=False)
        return genai.Generator(self._model, params)

    def _append(self, generator: genai.Generator, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        require_known(ids, self.vocab_size, self._path)
        generator.append_tokens(ids.astype(np.int32))
        logits: NDArray[np.float32] = np.asarray(generator.get_output("logits"), dtype=np.float32)[0]
        return logits


def open_runtime(path: Path, *, device: str = "cpu") -> GenaiRuntime:
    """Open a folder; arguments and errors are those of ``GenaiRuntime``."""
    if device not in ("auto", "cpu"):
        raise RuntimeFailure(f"onnxruntime-genai computes where its folder says, not on {device}", "Use the CPU.")
    return GenaiRuntime(path)


def devices() -> list[str]:
    """Return where onnxruntime-genai can compute."""
    return ["cpu", *(["cuda"] if genai.is_cuda_available() else [])]
