"""What all runtimes do with logits, and with cores."""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

BATCH = 128  # positions whose logits are in memory at a time: 78 MB at a vocabulary of 152 000


def log_softmax(logits: NDArray[np.float32]) -> None:
    """Turn each row of ``logits`` (rows, vocabulary) into natural log-probabilities, in place.

    The largest logit is taken off first and the sum is made in float64, so nothing overflows.
    """
    logits -= logits.max(axis=1, keepdims=True)
    total = np.exp(logits).sum(axis=1, keepdims=True, dtype=np.float64)
    logits -= np.log(total).astype(np.float32)


def usable_cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
