from __future__ import annotations

import pytest
from scipy import stats

from mka_export.parity.harness.paired import paired


def test_changes_are_counted_in_both_directions():
    found = paired([1, 1, 1, 0, 0, 1], [1, 0, 0, 1, 0, 1])
    assert (found.documents, found.lost, found.gained) == (6, 2, 1)
    assert (found.original, found.artifact) == pytest.approx((4 / 6, 3 / 6))
    assert found.difference.value == pytest.approx(-1 / 6)
    assert found.p == pytest.approx(1.0)


def test_p_is_that_of_coin_tosses():
    found = paired([1] * 10 + [0] * 90, [0] * 9 + [1] + [0] * 89 + [1])
    assert (found.lost, found.gained) == (9, 1)
    assert found.p == pytest.approx(sum(stats.binom.pmf([0, 1, 9, 10], 10, 0.5)))


def test_no_change_is_no_evidence_and_still_has_an_interval():
    found = paired([1, 0] * 10, [1, 0] * 10)
    assert (found.p, found.difference.value) == (1.0, 0.0)
    assert found.difference.low == -found.difference.high < 0
