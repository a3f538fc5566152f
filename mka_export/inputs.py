"""What the stages are fed with: the texts, and the token windows cut from them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from mka_export.errors import UsageError
from mka_export.models.dataset import PREFIX
from mka_export.models.text import Text, even_windows, load_text, shared_ngrams
from mka_export.models.tokenizer import leading_id, text_ids
from mka_export.options import TextOptions

CALIBRATION_WINDOW = 512
SELF = "self"  # --calibration: text sampled from the model
CHARACTERS = 8  # of a hub dataset, read for each calibration token: a token has about four
# Of the evaluation text's 13-word runs: set phrases recur in honest splits (5 of 241 000 between WikiText-2's
# validation and test splits), a text that holds a part of the other has far more.
MAX_SHARED = 0.001


@dataclass(frozen=True)
class Texts:
    """The texts of a job.

    Attributes:
        calibration: None where it is still to be fetched, or sampled from the model.
        evaluation: known to share no more with it than chance makes.
    """

    calibration: Text | None
    evaluation: Text


@dataclass(frozen=True)
class Windows:
    """Token windows and where they are from.

    Attributes:
        ids: (windows, tokens) int64.
        source: the text's path, or ``embedded``.
        bytes_per_token: UTF-8 bytes of the text over its tokens.
    """

    ids: NDArray[np.int64]
    source: str
    bytes_per_token: float

    @property
    def sha256(self) -> str:
        """The sha256 of the ids, as little-endian int32, row after row."""
        return hashlib.sha256(self.ids.astype("<i4").tobytes()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Return source, sha256 and size, for plan, manifest and report."""
        return {"source": self.source, "sha256": self.sha256, "tokens": self.ids.size}


def read_texts(options: TextOptions) -> Texts:
    """Read the texts that are on this machine.

    Raises:
        UsageError: they overlap.
        MkaError: one cannot be read.
    """
    where, evaluation = options.calibration, load_text("evaluation", options.text)
    if where is not None and (where == SELF or where.startswith(PREFIX)):
        return Texts(None, evaluation)
    calibration = load_text("calibration", None if where is None else Path(where))
    require_disjoint(calibration, evaluation)
    return Texts(calibration, evaluation)


def require_disjoint(calibration: Text, evaluation: Text) -> None:
    """Check that a model will not be judged by what it was fitted to.

    Raises:
        UsageError: the texts overlap.
    """
    shared = shared_ngrams(calibration, evaluation)
    if shared > MAX_SHARED * len(evaluation.ngrams):
        raise UsageError(
            f"calibration text ({calibration.source}) and evaluation text ({evaluation.source}) share {shared} runs of "
            "13 words",
            "A model must not be judged by text it was fitted to: give another --text or --calibration.",
        )


def windows_of(
    text: Text, tokenizer: PreTrainedTokenizerBase, count: int | None, tokens: int, budget: int = 0
) -> Windows:
    """Cut windows from a text.

    Args:
        count: how many; None for as many as ``budget`` tokens make, or as there are.

    Raises:
        MkaError: the text is too short.
    """
    ids = text_ids(tokenizer, text.text)
    leading = leading_id(tokenizer)
    if count is None:
        body = tokens - (leading is not None)
        count = max(1, min(budget // tokens, len(ids) // body))
    return Windows(
        even_windows(ids, count, tokens, leading, text.source), text.source, len(text.text.encode()) / len(ids)
    )
