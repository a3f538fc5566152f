"""Text to look at a model with (calibration) and to judge it by (evaluation): never the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mka_export.data import data_folder
from mka_export.errors import MkaError

EMBEDDED = "embedded"
NGRAM = 13  # words: the length below which a shared run is chance (GPT-3's contamination check, arXiv 2005.14165)


@dataclass(frozen=True)
class Text:
    """Some text and where it is from.

    Attributes:
        source: the file's path, or ``embedded``.
        text: its contents.
    """

    source: str
    text: str

    @cached_property
    def ngrams(self) -> frozenset[str]:
        """Every run of ``NGRAM`` words, in lower case."""
        words = self.text.lower().split()
        return frozenset(" ".join(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1))

    @property
    def sha256(self) -> str:
        """The sha256 of the UTF-8 text, in hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def load_text(kind: str, path: Path | None) -> Text:
    """Read ``path``, or the embedded text of ``kind`` (``calibration`` or ``evaluation``).

    Raises:
        MkaError: the file is unreadable, empty or not UTF-8.
    """
    if path is None:
        files = sorted((data_folder("sample_prompts") / kind).glob("*.txt"))
        return Text(EMBEDDED, "\n\n".join(f.read_text(encoding="utf-8").strip() for f in files) + "\n")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise MkaError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise MkaError(f"{path} is not UTF-8 (byte {error.start})", "Convert it to UTF-8.") from error
    if not text.strip():
        raise MkaError(f"{path} is empty", "Give a file with text in it.")
    return Text(str(path), text.replace("<unk>", ""))


def sample_prompts() -> list[str]:
    """Return the embedded prompts, one a line."""
    return (data_folder("sample_prompts") / "prompts.txt").read_text(encoding="utf-8").splitlines()


def sample_conversations() -> list[list[dict[str, str]]]:
    """Return the embedded conversations: turns, each with its ``role`` and its ``content``."""
    conversations: list[list[dict[str, str]]] = json.loads(_exact("conversations.json"))
    return conversations


def tokenizer_corpus() -> list[str]:
    """Return the texts on which two tokenizers must agree: each line, and the whole."""
    text = _exact("tokenizer_corpus.txt")
    return [*(line for line in text.split("\n") if line.strip()), text]


def tokenizer_oddities() -> list[str]:
    """Return texts on which llama.cpp is known to differ from a faithful tokenizer, and why not to fail for it.

    It does not normalise Unicode (Qwen's own tokenizer composes characters first), and takes a fixed list
    of spellings, such as ``</s>``, for control tokens in any vocabulary.
    """
    return [line for line in _exact("tokenizer_oddities.txt").split("\n") if line]


def _exact(name: str) -> str:
    return (data_folder("sample_prompts") / name).read_bytes().decode("utf-8")  # line ends as they are


def shared_ngrams(one: Text, other: Text) -> int:
    """Count the distinct runs of ``NGRAM`` words that stand in both texts, ignoring case."""
    return len(one.ngrams & other.ngrams)


def even_windows(ids: Sequence[int], count: int, tokens: int, bos: int | None, what: str) -> NDArray[np.int64]:
    """Cut ``count`` windows of ``tokens`` ids out of ``ids``, evenly spread, none overlapping another.

    The first starts at the text's start, the last ends at its end (a single one starts at the start). Where
    the tokenizer puts ``bos`` before every text, each window is BOS and ``tokens - 1`` ids.

    Args:
        what: names the text in the error.

    Returns:
        (count, tokens) int64.

    Raises:
        MkaError: the text holds fewer windows.
    """
    lead = [] if bos is None else [bos]
    body = tokens - len(lead)
    if len(ids) // body < count:
        raise MkaError(
            f"the text ({what}) has {len(ids)} tokens: {len(ids) // body} windows of {tokens} fit, {count} are wanted",
            "Give a longer text, or ask for fewer or shorter windows.",
        )
    spare = len(ids) - body
    starts = [spare * i // max(1, count - 1) for i in range(count)]
    return np.array([[*lead, *ids[start : start + body]] for start in starts], dtype=np.int64)
