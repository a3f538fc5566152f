"""What all runtimes do with ids, logits and cores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mka_export.errors import RuntimeFailure

BATCH = 128  # positions whose logits are in memory at a time: 78 MB at a vocabulary of 152 000


def log_softmax(logits: NDArray[np.float32]) -> None:
    """Turn each row of ``logits`` (rows, vocabulary) into natural log-probabilities, in place.

    The largest logit is taken off first and the sum is made in float64, so nothing overflows.
    """
    logits -= logits.max(axis=1, keepdims=True)
    total = np.exp(logits).sum(axis=1, keepdims=True, dtype=np.float64)
    logits -= np.log(total).astype(np.float32)


def require_tokens(prompt: Sequence[int] | NDArray[np.int64]) -> None:
    """Raise ``RuntimeFailure`` for a prompt with no tokens."""
    if not len(prompt):
        raise RuntimeFailure("a prompt has no tokens", "Give at least one.")


def require_known(ids: NDArray[np.int64], vocab_size: int, path: Path) -> None:
    """Raise ``RuntimeFailure`` for ids that the artifact at ``path`` has no token for."""
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise RuntimeFailure(f"{path} has {vocab_size} tokens; asked for id {ids.max()}")


def usable_cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
