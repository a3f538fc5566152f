"""Two models on the same documents: how many answers changed, and what that says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mka_export.parity.statistics import Interval, mcnemar, paired_change


@dataclass(frozen=True)
class Paired:
    """The artifact against the original, on a metric that is 0 or 1 for every document.

    Attributes:
        documents: how many.
        original, artifact: share of ones.
        difference: artifact less original, with its interval.
        lost, gained: documents that only the original, or only the artifact, has right.
        p: of McNemar's exact test, that a change goes either way equally often (two-sided).
    """

    documents: int
    original: float
    artifact: float
    difference: Interval
    lost: int
    gained: int
    p: float


def paired(original: Sequence[int], artifact: Sequence[int]) -> Paired:
    """Compare answers, 0 or 1, to the same documents, in the same order."""
    before, after = np.asarray(original), np.asarray(artifact)
    lost, gained = int(((before == 1) & (after == 0)).sum()), int(((before == 0) & (after == 1)).sum())
    difference = paired_change(gained, lost, len(before))
    return Paired(
        len(before), float(before.mean()), float(after.mean()), difference, lost, gained, mcnemar(gained, lost)
    )
