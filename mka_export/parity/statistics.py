"""How sure the figures are: windows and questions are the independent units.

Losses: standard errors, and a bootstrap over whole windows. Answers, right or wrong: tests and intervals of counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

RESAMPLES = 10_000
DRAWS = 1 << 23  # at a time: 134 MB with their copy for the product; all of MMLU's questions would take 2.2 GB
CONFIDENCE = 0.95
POWER = 0.8  # share of cases in which a difference of the size that is stated would show
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
    block = max(1, DRAWS // windows)
    t = stats.t.ppf((1 - confidence) / 2, windows - 1)
    tail = stats.norm.cdf(t * np.sqrt(windows / (windows - 1)))
    with np.errstate(invalid="ignore"):
        drawn = np.concatenate(  # (resamples, figures)
            [
                rng.multinomial(windows, np.full(windows, 1 / windows), size=min(block, resamples - done)) @ values
                for done in range(0, resamples, block)
            ]
        )
        drawn /= windows
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


def shift_seen(interval: Interval) -> float:
    """Return the smallest true shift of a mean that as many windows show in ``POWER`` of cases, by its interval's width."""
    error = (interval.high - interval.low) / 2 / _quantile(CONFIDENCE)
    return (_quantile(CONFIDENCE) + _quantile(2 * POWER - 1)) * error


def cases_to_decide(interval: Interval, limit: float, cases: int) -> int | None:
    """Return how many cases would bring the whole interval to one side of ``limit``, if the figure stays as it is.

    None where it stands on the limit, or has no interval.
    """
    reach = interval.high - interval.value if interval.value < limit else interval.value - interval.low
    distance = abs(limit - interval.value)
    return math.ceil(cases * (reach / distance) ** 2) if distance and math.isfinite(reach) else None


def share(count: int, of: int) -> Interval:
    """Return a share of independent cases with Wilson's interval (doi:10.1080/01621459.1927.10502953)."""
    low, high = stats.binomtest(count, of).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(count / of, float(low), float(high))


def at_chance(right: int, of: int, choices: int) -> bool:
    """Tell whether so many right answers are what guessing gives: a binomial test, one-sided, finds nothing more."""
    return bool(stats.binomtest(right, of, 1 / choices, alternative="greater").pvalue > 1 - CONFIDENCE)


def paired_change(gained: int, lost: int, of: int) -> Interval:
    """Return the difference of two shares over the same cases, from the cases in which the two differ.

    The interval is Wald's with half a case added to each cell of the table (Agresti and Min 2005,
    doi:10.1002/sim.1781), which covers well where few cases differ, or none.
    """
    total, better, worse = of + 2, gained + 0.5, lost + 0.5
    centre = (better - worse) / total
    reach = _quantile(CONFIDENCE) * math.sqrt(better + worse - (better - worse) ** 2 / total) / total
    return Interval((gained - lost) / of, max(-1.0, centre - reach), min(1.0, centre + reach))


def mcnemar(gained: int, lost: int) -> float:
    """Return the p-value of McNemar's exact test that gains and losses are as likely: 1 where there are none."""
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def false_discoveries(p: list[float]) -> list[float]:
    """Return p-values adjusted so that a limit on them limits the rate of false discoveries (Benjamini and Hochberg)."""
    return [float(q) for q in stats.false_discovery_control(p)] if p else []


def smallest_seen(differing: int, of: int) -> float:
    """Return the smallest true change of a share that the test shows in ``POWER`` of cases.

    From the share of cases in which the two differ (Connor 1987, doi:10.2307/2531961, its approximation for small
    changes).
    """
    return (_quantile(CONFIDENCE) + _quantile(2 * POWER - 1)) * math.sqrt((differing + 1) / (of + 2) / of)


def cases_for(margin: float, differing: int, of: int) -> int:
    """Return how many cases it takes for ``smallest_seen`` to be ``margin``, where as large a share of them differs."""
    return math.ceil(of * (smallest_seen(differing, of) / margin) ** 2)


def _quantile(confidence: float) -> float:
    """Return how many standard errors a two-sided interval reaches."""
    return float(stats.norm.ppf((1 + confidence) / 2))
