"""Where the loss came from: what each step on the way to the artifact changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np

from mka_export.parity.metrics import Values
from mka_export.parity.statistics import bootstrap_means

LN_PPL, MMLU = "ln_ppl", "mmlu"


def attribution(metric: str, steps: Mapping[str, Values]) -> dict[str, Any]:
    """Return an entry of the report's ``attribution``: the paired change of each step against the one before it.

    The intervals are ``bootstrap_means``'s. The changes add up to that of the last step against the first.

    Args:
        metric: its name in the report.
        steps: name -> values of the metric, in the order in which one was made from another: a row for each window
            or question, of which the mean is taken: (units,) or (units, values).
    """
    means = {name: values.reshape(len(values), -1).mean(axis=1) for name, values in steps.items()}
    pairs = list(pairwise(means))
    with np.errstate(invalid="ignore"):  # inf - inf: a broken model
        changes = np.stack([means[name] - means[before] for before, name in pairs], axis=1)
    return {
        "metric": metric,
        "steps": [
            {"name": name, "against": before, "change": asdict(change)}
            for (before, name), change in zip(pairs, bootstrap_means(changes), strict=True)
        ],
    }
