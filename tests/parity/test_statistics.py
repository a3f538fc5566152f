from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mka_export.parity import statistics
from mka_export.parity.statistics import MIN_WINDOWS, Interval, bootstrap_means, cases_to_decide, perplexity, shift_seen

columns = arrays(np.float64, st.tuples(st.integers(MIN_WINDOWS, 20), st.just(1)), elements=st.floats(-50, 50, width=32))


@given(columns)
def test_the_interval_holds_the_mean_and_stays_within_the_values(values: np.ndarray) -> None:
    (found,) = bootstrap_means(values, resamples=500)
    slack = 1e-9 * (1 + np.abs(values).max())
    assert found.value == pytest.approx(values.mean(), abs=1e-9)
    assert values.min() - slack <= found.low <= found.value + slack
    assert found.value - slack <= found.high <= values.max() + slack


@given(columns, st.floats(0.1, 10), st.floats(-5, 5))
def test_the_interval_moves_and_stretches_with_the_values(values: np.ndarray, scale: float, shift: float) -> None:
    (one,) = bootstrap_means(values, resamples=200)
    (other,) = bootstrap_means(values * scale + shift, resamples=200)
    assert (other.low, other.high) == pytest.approx((one.low * scale + shift, one.high * scale + shift), abs=1e-6)


def test_equal_windows_leave_no_doubt_and_other_windows_do() -> None:
    same, other = bootstrap_means(np.column_stack([np.full(8, 0.3), np.arange(8.0)]))
    assert (same.low, same.high) == pytest.approx((0.3, 0.3))
    assert other.low < 3
    assert other.high > 4


def test_it_is_the_same_every_time_and_follows_the_seed() -> None:
    values = np.random.default_rng(1).normal(size=(16, 2))
    assert bootstrap_means(values) == bootstrap_means(values)
    assert bootstrap_means(values) != bootstrap_means(values, seed=1)


@pytest.mark.parametrize("windows", [8, 16, 32])
@pytest.mark.parametrize("draw", ["normal", "gamma"])
def test_95_percent_intervals_cover_the_truth_that_often(windows: int, draw: str) -> None:
    # Gamma(4) is about as skewed as the mean KL divergence of a window.
    rng, runs = np.random.default_rng(7), 600
    samples = rng.normal(4, 2, (runs, windows)) if draw == "normal" else rng.gamma(4, 1, (runs, windows))
    covered = np.mean([i.low <= 4 <= i.high for i in bootstrap_means(samples.T, resamples=2000)])
    assert 0.91 <= covered <= 0.985


def test_pairing_takes_out_what_both_models_find_hard() -> None:
    rng = np.random.default_rng(3)
    difficulty = rng.normal(3, 0.8, 16)
    one, other = difficulty + rng.normal(0, 0.01, 16), difficulty + 0.05 + rng.normal(0, 0.01, 16)
    paired, alone = bootstrap_means(np.column_stack([other - one, other]))
    assert paired.high - paired.low < (alone.high - alone.low) / 10
    assert paired.low > 0


def test_too_few_windows_bound_nothing() -> None:
    (found,) = bootstrap_means(np.ones((MIN_WINDOWS - 1, 1)))
    assert found == Interval(1.0, -math.inf, math.inf)
    assert found.exp() == Interval(pytest.approx(math.e), 0.0, math.inf)


def test_nan_stays_visible() -> None:
    bad, good = bootstrap_means(np.column_stack([[1.0] * 7 + [math.nan], np.ones(8)]))
    assert math.isnan(bad.value)
    assert math.isnan(bad.low)
    assert good == Interval(1.0, pytest.approx(1.0), pytest.approx(1.0))


def test_perplexity_and_its_standard_error() -> None:
    nll = np.log([[2.0, 8.0], [4.0, 4.0], [1.0, 16.0], [8.0, 8.0]])  # window means ln 4, 4, 4, 8
    value, error = perplexity(nll)
    assert value == pytest.approx(4 * 2**0.25)
    assert error == pytest.approx(value * math.log(2) / 4)  # means differ by ln 2 in one of four: s = ln 2 / 2
    assert math.isnan(perplexity(nll[:1])[1])


def test_the_standard_error_agrees_with_simulation() -> None:
    rng = np.random.default_rng(0)
    runs = [perplexity(rng.normal(3, 0.2, (32, 1)) + np.zeros((1, 4))) for _ in range(400)]
    values, errors = np.array(runs).T
    assert errors.mean() == pytest.approx(values.std(), rel=0.1)


def test_resamples_are_drawn_in_blocks_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=(40, 2))
    whole = bootstrap_means(values, resamples=1000)
    monkeypatch.setattr(statistics, "DRAWS", 40 * 300)
    for one, other in zip(whole, bootstrap_means(values, resamples=1000), strict=True):
        assert vars(one) == pytest.approx(vars(other), rel=1e-12)


def test_what_so_many_windows_show_they_show_as_often_as_is_said() -> None:
    rng, windows = np.random.default_rng(8), 40
    (interval,) = bootstrap_means(rng.normal(0, 1, (windows, 1)))
    assert shift_seen(interval) == pytest.approx(2.8 / np.sqrt(windows), rel=0.25)  # (1.96 + 0.84) standard errors
    shown = [
        bootstrap_means(rng.normal(2.8 / np.sqrt(windows), 1, (windows, 1)), resamples=500)[0].low > 0
        for _ in range(300)
    ]
    assert 0.72 < np.mean(shown) < 0.88


def test_cases_to_decide_bring_the_interval_to_the_limit() -> None:
    assert cases_to_decide(Interval(1.0, 0.75, 1.5), 1.25, 16) == 64  # twice as near takes four times as many
    assert cases_to_decide(Interval(1.5, 1.0, 1.625), 1.25, 16) == 64
    assert cases_to_decide(Interval(1.3, 1.2, 1.5), 1.3, 16) is None
    assert cases_to_decide(Interval(1.2, -np.inf, np.inf), 1.3, 3) is None
