"""How sure the figures are: standard errors and bootstrap intervals, windows being the independent units."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

RESAMPLES = 10_000
CONFIDENCE = 0.95
MIN_WINDOWS = 5  # fewer have too few distinct resamples to say how far the mean may be off
SEED = 2406_16330


@dataclass(frozen=True)
class Interval:
    """A figure with its interval; infinite bounds where the data cannot bound it."""

    value: float
    low: float
    high: float

    def exp(self) -> Interval:
        """Return the interval of the figure's exponential."""
        with np.errstate(over="ignore"):
            value, low, high = (float(np.exp(x)) for x in (self.value, self.low, self.high))
        return Interval(value, low, high)


def bootstrap_means(
    values: NDArray[np.float64], *, resamples: int = RESAMPLES, confidence: float = CONFIDENCE, seed: int = SEED
) -> list[Interval]:
    """Bound the mean of each column of ``values`` (windows, figures) by a bootstrap over whole windows.

    Tokens of a window depend on each other, windows hardly, so windows are drawn, with replacement; all
    figures share the draws. Columns that are differences between two models on the same window make it a
    paired comparison. The percentiles are widened for the number of windows ("expanded percentile", Hesterberg
    2015, doi:10.1080/00031305.2015.1089789, section 4.3), since the plain ones are too narrow for few.

    Returns:
        One interval a column; unbounded for fewer than ``MIN_WINDOWS`` windows, NaN where a value is not finite.
    """
    windows = len(values)
    means = values.mean(axis=0)
    if windows < MIN_WINDOWS:
        return [Interval(float(mean), -np.inf, np.inf) for mean in means]
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(windows, np.full(windows, 1 / windows), size=resamples)
    t = stats.t.ppf((1 - confidence) / 2, windows - 1)
    tail = stats.norm.cdf(t * np.sqrt(windows / (windows - 1)))
    with np.errstate(invalid="ignore"):
        drawn = counts @ values / windows  # (resamples, figures)
        low, high = np.quantile(drawn, [tail, 1 - tail], axis=0)
    return [Interval(float(m), float(a), float(b)) for m, a, b in zip(means, low, high, strict=True)]


def perplexity(nll: NDArray[np.float64]) -> tuple[float, float]:
    """Return perplexity and its standard error for nll (windows, positions) in nats.

    The error is the delta method's: perplexity × standard error of the mean over windows. NaN for one window.
    """
    means = nll.mean(axis=1)
    with np.errstate(over="ignore", invalid="ignore"):  # a broken model's infinities are judged later
        value = float(np.exp(means.mean()))
        error = float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else np.nan
    return value, value * error
