"""Runtimes: the programs that run a model. Parity knows them only by the interface here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from mka_export.errors import RuntimeFailure, UsageError, unknown_name
from mka_export.models.chat import Conversation, Rendered

Windows = NDArray[np.int64]  # (windows, tokens): token ids, what the runtime sees and nothing else
LogProbs = NDArray[np.float32]  # (tokens, vocabulary): natural logarithms
Ids = tuple[int, ...]
ONNX_CONFIG = "genai_config.json"  # in every folder that onnxruntime-genai opens


@dataclass(frozen=True)
class Prefixed:
    """Texts that begin alike.

    Attributes:
        prefix: the ids that all begin with; may be none.
        rests: how each goes on, by at least one id.
    """

    prefix: Ids
    rests: tuple[Ids, ...]


class Runtime(Protocol):
    """A loaded model that gives next-token log-probabilities for token ids.

    Attributes:
        name: as the targets name it, e.g. ``llama.cpp``.
        device: where it computes, e.g. ``cpu``; goes beside every figure.
        vocab_size: columns of ``log_probs``.
        ends: ids that end a text, by what ships inside the artifact.
    """

    name: str
    device: str
    vocab_size: int
    ends: frozenset[int]

    def tokenize(self, text: str) -> list[int]:
        """Turn text into ids with the tokenizer that ships inside the artifact.

        No BOS or EOS is added; special-token spellings in the text are read as special tokens. A space that
        the tokenizer itself puts before every text (SentencePiece) stays.
        """

    def detokenize(self, ids: Sequence[int]) -> str:
        """Turn ids into text, special tokens spelled out."""

    def log_probs(self, windows: Windows) -> Iterator[LogProbs]:
        """Yield, window by window, the log-probabilities after each of its tokens: row t is for token t + 1.

        Raises:
            RuntimeFailure: the runtime cannot run the model.
        """

    def next_log_probs(self, texts: Sequence[Prefixed], tokens: Sequence[int]) -> Iterator[LogProbs]:
        """Yield the log-probabilities of ``tokens`` right after each text, in order: (some texts, tokens) at a time.

        What the texts of a group begin with is computed once, and its key-value state used for all of them.

        Raises:
            RuntimeFailure: the runtime cannot run the model.
        """

    def rest_log_probs(self, texts: Sequence[Prefixed]) -> Iterator[LogProbs]:
        """Yield, text by text, the log-probabilities after each token of how it goes on: as ``log_probs``, for these only.

        What the texts of a group begin with is computed once, and its key-value state used for all of them.

        Raises:
            RuntimeFailure: the runtime cannot run the model.
        """

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Continue each prompt greedily; stops after an end-of-text token (not returned)."""

    def render_chats(self, conversations: Sequence[Conversation]) -> list[Rendered] | None:
        """Render conversations by the chat template that ships inside the artifact; None if none does."""

    def close(self) -> None:
        """Free the model."""


# name -> module with open_runtime (path: Path, **options) -> Runtime, and devices () -> list[str]. All but torch,
# which is the reference, run in a process of their own.
RUNTIMES = {
    "torch": "mka_export.parity.runtimes.torch_runtime",
    "llama.cpp": "mka_export.parity.runtimes.llama_cpp_runtime",
    "onnxruntime": "mka_export.parity.runtimes.onnx_runtime",
    "onnxruntime-genai": "mka_export.parity.runtimes.genai_runtime",
}
RUNTIME_PACKAGES = {  # whose versions a measurement depends on
    "torch": ("torch",),
    "llama.cpp": ("llama-cpp-python",),
    "onnxruntime": ("onnxruntime",),
    "onnxruntime-genai": ("onnxruntime-genai", "onnxruntime"),
}
# Text that a runtime's own tokenizers are known to read otherwise than they should, whatever the artifact says: to
# onnxruntime-genai 0.18 a blank line with blanks is two line ends, white space belongs to a numeral after it (other than 0 to
# 9, which our folders have as tokens of their own), and U+0085 is no white space.
MISREAD = {"onnxruntime-genai": r"\s*[\r\n][^\S\r\n]+[\r\n]\s*|\s+(?![0-9])\p{N}|\s*\x85[\s']*"}


def open_runtime(name: str, path: Path, **options: object) -> Runtime:
    """Load the model at ``path`` in the runtime called ``name``.

    Raises:
        UsageError: no such runtime.
        RuntimeFailure: it is not installed, cannot load the model, or crashes or hangs on it.
    """
    if name not in RUNTIMES:
        raise UsageError(unknown_name("runtime", name, RUNTIMES))
    try:
        opener = import_module(RUNTIMES[name]).open_runtime
    except ImportError as error:
        remedy = (
            "Install it: pip install 'mka-export[onnx]'." if name.startswith("onnx") else "Install mka-export anew."
        )
        raise RuntimeFailure(f"{name} cannot be loaded: {error}", remedy) from error
    if name == "torch":
        return cast(Runtime, opener(path, **options))
    from mka_export.parity.runtimes.isolated import IsolatedRuntime

    return IsolatedRuntime(opener, path, options)
