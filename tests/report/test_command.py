from __future__ import annotations

import shlex
from typing import Any

import pytest
from command import type_in
from full_report import enrich

from mka_export.report.command import command


def parsed(text: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, Any]]:
    """Give a command to our own parser: which entry of the pipeline it asks for, and with what."""
    from mka_export import pipeline
    from mka_export.pipeline import check

    asked: list[tuple[str, dict[str, Any]]] = []
    for place, name in ((pipeline, "run"), (pipeline, "convert_only"), (check, "check")):
        monkeypatch.setattr(place, name, lambda *a, _n=name, **k: asked.append((_n, {"arguments": a, **k})) or 0)
    program, *words = shlex.split(text)
    assert program == "mka-export"
    result = type_in(*words)
    assert result.exit_code == 0, result.output
    return asked[0]


def test_a_merge_with_healing(report: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    report = enrich(report)
    report["merge"] |= {"schedule": "one-shot", "protect": 2}
    report["merge"]["calibration"]["source"] = "a text.txt"
    name, asked = parsed(command(report), monkeypatch)
    assert (name, asked["arguments"]) == ("run", ("smollm2-135m",))
    assert asked["merge"].ratio == pytest.approx(0.1)
    assert (asked["merge"].schedule, asked["merge"].protect) == ("one-shot", 2)
    assert (asked["heal"].heal, asked["heal"].heal_tokens, asked["heal"].heal_rate) == ("distill", 131_072, 5e-5)
    assert (asked["texts"].calibration, asked["texts"].calibration_tokens) == ("a text.txt", 16384)
    assert (asked["texts"].windows, asked["texts"].window_tokens) == (16, 512)
    assert (asked["mmlu"].mmlu, asked["mmlu"].mmlu_questions) == ("hub", 1140)
    assert (asked["mmlu"].mmlu_shots, asked["mmlu"].mmlu_seed) == (5, 7)
    assert asked["convert"].to == ("gguf-q4",)
    assert (asked["limits"].max_ppl_ratio, asked["limits"].conversion_max_ppl_ratio) == (1.35, 1.35)


def test_a_plan_that_was_replayed(report: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    report["merge"] |= {"plan": "a plan.json", "schedule": "one-shot"}
    asked = parsed(command(report), monkeypatch)[1]
    assert (str(asked["merge"].plan), asked["merge"].ratio, asked["merge"].schedule) == (
        "a plan.json",
        None,
        "iterative",
    )
    assert asked["texts"].calibration_tokens == 16384


@pytest.mark.parametrize(
    ("method", "steps", "alpha"),
    [
        ("mka-paper", [(0.97, 0.3), (0.3, 0.3)], 0.3),
        ("mka-paper", [(0.97, 0.97), (0.9, 0.9)], None),
        ("tail", [(None, 1.0)], None),
    ],
)
def test_the_weight_of_an_average_is_named_where_it_was_given(method, steps, alpha, report, monkeypatch) -> None:
    report = enrich(report)
    made = [{"lower": [8, 8], "upper": [9, 9], "similarity": s, "alpha": a} for s, a in steps]
    report["merge"] |= {"method": method, "steps": made}
    assert parsed(command(report), monkeypatch)[1]["merge"].alpha == alpha


def test_attribution_is_asked_for_where_it_was_made(report: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not parsed(command(report), monkeypatch)[1]["convert"].attribute
    report["targets"][0]["steps"].append({"name": "quantized"})
    assert parsed(command(report), monkeypatch)[1]["convert"].attribute


def test_a_conversion_of_a_hub_model(report: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    report["merge"] = None
    report["model"] |= {"name": "org/model", "source": {"kind": "hub", "id": "org/model", "revision": "c" * 40}}
    name, asked = parsed(command(report), monkeypatch)
    assert (name, asked["arguments"], asked["output"].revision) == ("convert_only", ("org/model",), "c" * 40)


def test_a_conversion_that_failed(report: dict[str, Any], target: dict[str, Any]) -> None:
    report |= {"merge": None, "stages": []}
    target |= {"artifact": None, "comparisons": {}}
    assert command(report).startswith("mka-export convert smollm2-135m --to gguf-q4")


def test_a_check_of_an_artifact(report: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    report |= {"merge": None, "stages": [{"name": "parity/gguf-q4", "seconds": 1.0, "reused": False}]}
    name, asked = parsed(command(report), monkeypatch)
    assert name == "check"
    assert str(asked["arguments"][0]) == "out/gguf-q4/model.gguf"
    assert asked["arguments"][1] == "smollm2-135m"


def test_a_limit_of_one_target_only_is_left_to_it(report: dict[str, Any]) -> None:
    other = enrich(report)["targets"][0] | {"name": "gguf-q8"}
    other["comparisons"]["compression"]["limits"] = {"max_ppl_ratio": 1.1}
    report["targets"].append(other)
    assert "--max-ppl-ratio" not in command(report)
    assert "--conversion-max-ppl-ratio 1.35" in command(report)


def test_several_artifacts_that_were_checked_are_one_command_each(report: dict[str, Any]) -> None:
    report |= {"merge": None, "stages": [{"name": "parity/gguf-q4", "seconds": 1.0, "reused": False}]}
    other = enrich(report | {"merge": {"layers_before": 2, "layers_after": 1}})["targets"][0]
    other["artifact"]["path"] = "a b.gguf"
    other["comparisons"]["compression"]["limits"] = {"max_mean_kl": 0.5}
    report["targets"].append(other)
    first, second = command(report).split(" && ")
    assert first.startswith("mka-export check out/gguf-q4/model.gguf --against smollm2-135m")
    assert first.endswith("--max-ppl-ratio 1.35")
    assert second.startswith("mka-export check 'a b.gguf' --against smollm2-135m")
    assert second.endswith("--max-mean-kl 0.5")
