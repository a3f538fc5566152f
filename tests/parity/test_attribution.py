from __future__ import annotations

import math

import numpy as np
import pytest

from mka_export.parity.attribution import attribution
from mka_export.parity.statistics import bootstrap_means

RNG = np.random.default_rng(0)
STEPS = {name: RNG.normal(3 + i, 1, (12, 40)) for i, name in enumerate(("original", "merged", "quantized", "artifact"))}


def test_each_step_is_held_against_the_one_before_it() -> None:
    found = attribution("ln_ppl", STEPS)
    assert found["metric"] == "ln_ppl"
    pairs = [(step["name"], step["against"]) for step in found["steps"]]
    assert pairs == [("merged", "original"), ("quantized", "merged"), ("artifact", "quantized")]
    for step in found["steps"]:
        gap = STEPS[step["name"]] - STEPS[step["against"]]
        assert step["change"]["value"] == pytest.approx(gap.mean())
        assert step["change"]["low"] < step["change"]["value"] < step["change"]["high"]
    total = STEPS["artifact"].mean() - STEPS["original"].mean()
    assert sum(step["change"]["value"] for step in found["steps"]) == pytest.approx(total)


def test_the_intervals_are_paired() -> None:
    """What all windows lose alike is known exactly, however much the windows differ."""
    windows = RNG.normal(3, 10, (12, 1))
    (step,) = attribution("ln_ppl", {"original": windows, "artifact": windows + 0.25})["steps"]
    assert step["change"] == pytest.approx({"value": 0.25, "low": 0.25, "high": 0.25})


def test_questions_are_units_as_windows_are() -> None:
    right = {name: RNG.integers(0, 2, 200).astype(float) for name in ("original", "artifact")}
    (step,) = attribution("mmlu", right)["steps"]
    (expected,) = bootstrap_means((right["artifact"] - right["original"])[:, None])
    assert step["change"] == vars(expected)


def test_a_broken_step_has_no_change() -> None:
    found = attribution("ln_ppl", {**STEPS, "artifact": np.full((12, 40), np.inf)})
    assert found["steps"][-1]["change"]["value"] == math.inf
    broken = attribution("ln_ppl", {name: np.full((12, 40), np.inf) for name in ("original", "artifact")})
    assert math.isnan(broken["steps"][0]["change"]["value"])
