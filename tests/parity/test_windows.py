from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mka_export.errors import MkaError, UsageError
from mka_export.parity.windows import evaluation_windows


def test_windows_are_spread_from_start_to_end() -> None:
    windows = evaluation_windows(range(100), 10, 4, None)
    assert windows.dtype == np.int64
    np.testing.assert_array_equal(windows[:, 0], [0, 30, 60, 90])
    np.testing.assert_array_equal(windows[-1], range(90, 100))


def test_bos_takes_the_first_place_of_each() -> None:
    windows = evaluation_windows(range(100, 200), 11, 10, 1)
    assert windows.shape == (10, 11)
    assert (windows[:, 0] == 1).all()
    np.testing.assert_array_equal(windows[:, 1:].ravel(), range(100, 200))


def test_a_single_window_is_the_start() -> None:
    np.testing.assert_array_equal(evaluation_windows(range(50), 5, 1, None), [range(5)])


@given(st.integers(2, 40), st.integers(1, 12), st.integers(0, 300), st.sampled_from([None, 7]))
def test_windows_never_overlap(tokens: int, count: int, spare: int, bos: int | None) -> None:
    body = tokens - (bos is not None)
    ids = range(1000, 1000 + body * count + spare)
    windows = evaluation_windows(ids, tokens, count, bos)
    assert windows.shape == (count, tokens)
    text = windows[:, -body:].ravel()
    assert (np.diff(text) > 0).all()  # so none overlaps, and all are in order
    assert text[0] == ids[0]
    assert count == 1 or text[-1] == ids[-1]


def test_too_short_a_text_says_what_fits() -> None:
    with pytest.raises(MkaError, match="39 tokens: 3 windows of 10 fit, 4 are wanted"):
        evaluation_windows(range(39), 10, 4, None)
    with pytest.raises(MkaError, match="0 windows"):
        evaluation_windows([], 512, 1, 0)


@pytest.mark.parametrize(("tokens", "count"), [(1, 1), (0, 3), (10, 0), (10, -1)])
def test_windows_that_predict_nothing_are_refused(tokens: int, count: int) -> None:
    with pytest.raises(UsageError):
        evaluation_windows(range(100), tokens, count, None)
