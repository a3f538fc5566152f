from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from parity_fakes import FakeRuntime, random_runtime

from mka_export.parity.comparison import Comparison, Difference, Step, measure
from mka_export.parity.statistics import Interval
from mka_export.parity.verdict import Verdict, judge, worst
from mka_export.target import Limits

NONE = Limits()


def exactly(value: float) -> Interval:
    return Interval(value, value, value)


def compared(ratio: Interval, kl: Interval, top1: Interval, *, windows: int = 16, nll: float = 3.0) -> Comparison:
    ln = Interval(*(math.log(x) if x > 0 else -math.inf for x in (ratio.value, ratio.low, ratio.high)))
    steps = tuple(
        Step(name, "fake", "cpu", n, math.exp(n), 0.1, None, 1000)
        for name, n in (("original", nll), ("artifact", nll + ln.value))
    )
    return Comparison(windows, steps, {"compression": Difference("original", 100, ln, kl, kl.value, kl.value, top1)})


@pytest.mark.parametrize(
    ("limits", "outcome"),
    [
        (Limits(max_ppl_ratio=1.35), "pass"),
        (Limits(max_ppl_ratio=1.25), "inconclusive"),
        (Limits(max_ppl_ratio=1.10), "fail"),
        (Limits(max_mean_kl=0.04), "pass"),
        (Limits(max_mean_kl=0.03), "inconclusive"),
        (Limits(max_mean_kl=0.01), "fail"),
        (Limits(min_top1=0.90), "pass"),
        (Limits(min_top1=0.925), "inconclusive"),
        (Limits(min_top1=0.99), "fail"),
        (Limits(), "pass"),
        (Limits(max_ppl_ratio=1.35, max_mean_kl=0.03), "inconclusive"),
        (Limits(max_ppl_ratio=1.25, max_mean_kl=0.04, min_top1=0.99), "fail"),
    ],
)
def test_an_interval_on_one_side_decides_and_else_nothing_does(limits: Limits, outcome: str) -> None:
    comparison = compared(Interval(1.25, 1.2, 1.3), Interval(0.03, 0.02, 0.04), Interval(0.92, 0.91, 0.93))
    verdict = judge(comparison, NONE, limits)
    assert verdict.outcome == outcome
    assert verdict.exit_code == {"pass": 0, "fail": 3, "inconclusive": 4}[outcome]


def test_a_bound_on_the_limit_keeps_it() -> None:
    comparison = compared(exactly(1.0), exactly(0.5), exactly(0.75))
    assert judge(comparison, NONE, Limits(1.0, 0.5, 0.75)).outcome == "pass"


def test_reasons_are_sentences_and_the_worst_comes_first() -> None:
    comparison = compared(Interval(1.25, 1.2, 1.3), Interval(0.03, 0.02, 0.04), exactly(0.9))
    verdict = judge(comparison, NONE, Limits(max_ppl_ratio=1.35, max_mean_kl=0.01, min_top1=0.9))
    assert verdict.reasons == [
        "Compression: mean KL divergence against the original model is 0.03 (95 % interval 0.02 to 0.04): "
        "it breaks the limit of at most 0.01.",
        "Compression: perplexity ratio against the original model is 1.25 (95 % interval 1.2 to 1.3): "
        "it keeps the limit of at most 1.35.",
        "Compression: top-1 agreement against the original model is 0.9 (95 % interval 0.9 to 0.9): "
        "it keeps the limit of at least 0.9.",
    ]
    assert judge(comparison, NONE, NONE).reasons == ["No limit was set, so nothing was judged."]


def test_each_comparison_has_its_own_limits() -> None:
    base = compared(exactly(1.3), exactly(0.2), exactly(0.9)).differences["compression"]
    tight = replace(base, ln_ppl_ratio=exactly(math.log(1.02)), against="merged")
    steps = tuple(Step(n, "fake", "cpu", 3.0, 20.0, 0.1, None, 1000) for n in ("original", "merged", "artifact"))
    comparison = Comparison(16, steps, {"conversion": tight, "compression": base})
    verdict = judge(comparison, Limits(max_ppl_ratio=1.1), Limits(max_ppl_ratio=1.35))
    assert verdict.outcome == "pass"
    assert [c.limit for kind in ("conversion", "compression") for c in verdict.checks[kind]] == [1.1, 1.35]
    swapped = judge(comparison, Limits(max_ppl_ratio=1.35), Limits(max_ppl_ratio=1.1))
    assert swapped.outcome == "fail"
    entries = swapped.to_dict()["comparisons"]
    assert {kind: entry["verdict"] for kind, entry in entries.items()} == {"conversion": "pass", "compression": "fail"}


def test_a_hard_failure_outweighs_every_figure() -> None:
    comparison = compared(exactly(1.0), exactly(0.0), exactly(1.0))
    verdict = judge(comparison, NONE, Limits(max_ppl_ratio=1.35), ["token ids of 'a' differ."])
    assert (verdict.outcome, verdict.exit_code) == ("fail", 3)
    assert verdict.reasons[0] == "token ids of 'a' differ."
    assert verdict.to_dict()["error"] == "token ids of 'a' differ."


def test_an_artifact_that_could_not_be_run_fails_without_figures() -> None:
    verdict = judge(None, NONE, NONE, ["llama.cpp: cannot load x.gguf."])
    assert verdict.outcome == "fail"
    assert verdict.to_dict() == {
        "verdict": "fail",
        "error": "llama.cpp: cannot load x.gguf.",
        "steps": [],
        "comparisons": {},
        "warnings": [],
    }


@pytest.mark.parametrize("limits", [NONE, Limits(max_ppl_ratio=1e9, max_mean_kl=1e9, min_top1=0.0)])
@pytest.mark.parametrize("value", [math.nan, 0.0])
def test_nan_and_ruled_out_tokens_fail_whatever_the_limits(value: float, limits: Limits) -> None:
    windows = np.array([[0, 1, 2]] * 6)
    broken = FakeRuntime([0.5, 0.5, value], 3)
    verdict = judge(measure(broken, FakeRuntime([0.3, 0.3, 0.4], 3), None, windows), NONE, limits)
    assert verdict.outcome == "fail"
    assert "not a finite number" in verdict.reasons[0]
    as_json = json.dumps(verdict.to_dict(), allow_nan=False)
    assert json.loads(as_json)["comparisons"]["compression"]["verdict"] == "fail"


def test_an_exploded_perplexity_is_said_in_words() -> None:
    verdict = judge(compared(exactly(40.0), exactly(0.1), exactly(0.9)), NONE, NONE)
    assert verdict.outcome == "pass"
    (warning,) = verdict.warnings
    assert "perplexity exploded" in warning
    assert "40 times" in warning
    assert not judge(compared(exactly(1.9), exactly(0.1), exactly(0.9)), NONE, NONE).warnings


def test_a_reference_at_chance_does_not_decide_by_perplexity() -> None:
    comparison = compared(exactly(1.01), exactly(0.001), exactly(0.99), nll=math.log(1000) + 0.1)
    verdict = judge(comparison, NONE, Limits(max_ppl_ratio=1.0, max_mean_kl=0.01))
    assert verdict.outcome == "pass"
    assert [check.metric for check in verdict.checks["compression"]] == ["mean_kl"]
    assert "no better than chance" in verdict.warnings[0]


def test_few_windows_are_inconclusive_and_say_so() -> None:
    windows = np.random.default_rng(0).integers(0, 7, (2, 30))
    verdict = judge(measure(random_runtime(0), random_runtime(0), None, windows), NONE, Limits(None, 0.1, 0.5))
    assert (verdict.outcome, verdict.exit_code) == ("inconclusive", 4)
    assert any("too few" in warning for warning in verdict.warnings)
    assert "no interval" in verdict.reasons[0]


def test_another_vocabulary_size_is_mentioned() -> None:
    windows = np.array([[0, 1]] * 6)
    verdict = judge(measure(FakeRuntime([0.5, 0.3, 0.2], 3), FakeRuntime([0.6, 0.4], 2), None, windows), NONE, NONE)
    assert any("3 tokens" in warning and "original model 2" in warning for warning in verdict.warnings)


def test_the_report_has_every_figure() -> None:
    windows = np.zeros((6, 30), dtype=np.int64)
    original, merged, artifact = (random_runtime(seed) for seed in range(3))
    comparison = measure(artifact, original, {"merged": merged}, windows, bytes_per_token=4.0)
    entry = json.loads(
        json.dumps(judge(comparison, Limits(1.1), Limits(1.35, min_top1=0.1)).to_dict(), allow_nan=False)
    )
    assert [step["name"] for step in entry["steps"]] == ["original", "merged", "artifact"]
    assert set(entry["steps"][0]) == {"name", "runtime", "device", "perplexity", "perplexity_se", "bits_per_byte"}
    conversion = entry["comparisons"]["conversion"]
    assert conversion["against"] == "merged"
    assert conversion["limits"] == {"max_ppl_ratio": 1.1}
    assert [check["metric"] for check in entry["comparisons"]["compression"]["checks"]] == ["ppl_ratio", "top1"]
    for name in ("ppl_ratio", "top1"):
        assert conversion[name]["low"] <= conversion[name]["value"] <= conversion[name]["high"]
    assert conversion["kl"]["low"] <= conversion["kl"]["mean"] <= conversion["kl"]["high"]
    assert conversion["kl"]["median"] <= conversion["kl"]["p99"]


def test_worst() -> None:
    assert worst([]) == "pass"
    assert worst(["pass", "inconclusive"]) == "inconclusive"
    assert worst(["inconclusive", "fail", "pass"]) == "fail"
    assert isinstance(judge(None, NONE, NONE), Verdict)
