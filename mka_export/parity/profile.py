"""How the figures are spread: perplexity along the window, and tokens by their divergence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mka_export.parity.comparison import Comparison
from mka_export.parity.metrics import Scores, Values

FIRST_BIN = 16  # tokens; each later bin is as wide as all before it, since the loss falls with the logarithm
KL_EDGES = tuple(float(f"{10 ** (half / 2):.3g}") for half in range(-12, 4))  # two a decade: 1e-06 to 31.6 nats


def profile(scores: Scores, comparison: Comparison) -> dict[str, Any]:
    """Return what the report calls ``profile``.

    Args:
        scores: of every step.
        comparison: made of them; names the steps and what is compared with what.
    """
    named = {step.name: scores.nll[step.name] for step in comparison.steps}
    tokens = next(iter(named.values())).shape[1] + 1
    return {
        "position": [
            {
                "first": first,
                "last": last,
                "perplexity": {name: _perplexity(nll[:, first - 1 : last]) for name, nll in named.items()},
            }
            for first, last in position_bins(tokens)
        ],
        "kl_histogram": {
            "edges": list(KL_EDGES),
            "counts": kl_counts({kind: scores.divergence[d.against].kl for kind, d in comparison.differences.items()}),
        },
    }


def position_bins(tokens: int) -> Iterator[tuple[int, int]]:
    """Yield first and last position of each bin of a window of ``tokens`` tokens, whose token 0 is not predicted."""
    first, end = 1, FIRST_BIN
    while first < tokens:
        yield first, min(end, tokens) - 1
        first, end = end, 2 * end


def kl_counts(kinds: Mapping[str, Values]) -> dict[str, list[int]]:
    """Count tokens between ``KL_EDGES``, those below the first and above the last too; NaN counts as above it."""
    return {
        kind: np.bincount(np.searchsorted(KL_EDGES, kl.ravel(), side="right"), minlength=len(KL_EDGES) + 1).tolist()
        for kind, kl in kinds.items()
    }


def _perplexity(nll: Values) -> float:
    with np.errstate(over="ignore"):  # a broken model's
        return float(np.exp(nll.mean()))
