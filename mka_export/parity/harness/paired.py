"""Two models on the same documents: how many answers changed, and what that says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from mka_export.parity.statistics import CONFIDENCE, Interval


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
    """Compare answers to the same documents, in the same order.

    The test is exact: of the documents that changed, half are gained (McNemar 1947, doi:10.1007/BF02295996). The interval is
    Wald's with half a document more in each cell of the table, which holds for few documents too (Agresti and Min 2005,
    doi:10.1002/sim.1781).
    """
    before, after = np.asarray(original), np.asarray(artifact)
    lost, gained = int(((before == 1) & (after == 0)).sum()), int(((before == 0) & (after == 1)).sum())
    p = float(stats.binomtest(gained, lost + gained).pvalue) if lost + gained else 1.0
    n, more, less = len(before) + 2, gained + 0.5, lost + 0.5
    centre = (more - less) / n
    reach = stats.norm.ppf((1 + CONFIDENCE) / 2) * math.sqrt(more + less - (more - less) ** 2 / n) / n
    difference = Interval(float(after.mean() - before.mean()), max(-1.0, centre - reach), min(1.0, centre + reach))
    return Paired(len(before), float(before.mean()), float(after.mean()), difference, lost, gained, p)
