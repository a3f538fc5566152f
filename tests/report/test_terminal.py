from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
from full_report import NO_FIGURES
from rich.console import Console

from mka_export.report import print_report


def printed(report: dict[str, Any], width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    print_report(report, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def line_with(text: str, *words: str) -> str:
    found = [line for line in text.splitlines() if all(word in line for word in words)]
    assert found, f"no line with {words} in:\n{text}"
    return found[0]


def test_the_verdict_comes_first(report: dict[str, Any]) -> None:
    first = printed(report).splitlines()[0]
    assert first.split() == ["PASS", "gguf-q4", "out/gguf-q4/model.gguf"]


def test_all_verdicts_come_before_the_figures(report: dict[str, Any], target: dict[str, Any]) -> None:
    other = copy.deepcopy(target) | {"name": "gguf-q3", "verdict": "fail"}
    report["targets"].append(other)
    lines = printed(report).splitlines()
    assert lines[0].split()[:2] == ["PASS", "gguf-q4"]
    assert lines[1].split()[:2] == ["FAIL", "gguf-q3"]


@pytest.mark.parametrize("verdict", ["fail", "inconclusive"])
def test_what_did_not_pass_stands_right_under_the_verdict(
    report: dict[str, Any], target: dict[str, Any], verdict: str
) -> None:
    target["verdict"] = verdict
    check = target["comparisons"]["compression"]["checks"][0]
    check |= {"verdict": verdict, "reason": "perplexity ratio 1.9 is over the limit 1.35"}
    lines = printed(report).splitlines()
    assert lines[0].split()[0] == verdict.upper()
    assert lines[1].strip() == "compression: perplexity ratio 1.9 is over the limit 1.35"


def test_the_figures_are_there(report: dict[str, Any]) -> None:
    text = printed(report)
    assert "20.12 ± 0.51" in line_with(text, "original", "torch, cpu")
    assert "llama.cpp, cpu" in line_with(text, "artifact", "25.40")
    ratio = line_with(text, "perplexity ratio")
    assert "1.020 (0.9800 to 1.070)  ≤ 1.35: pass" in ratio
    assert "1.260 (1.220 to 1.310)" in ratio
    assert "0.2113 (0.2000 to 0.2200)" in line_with(text, "mean KL")
    assert "0.1043, 1.789" in line_with(text, "median, p99")
    assert "81.23 % (80.00 to 82.00)" in line_with(text, "same top token")
    assert line_with(text, "conversion against merged", "compression against original")


def test_size_layers_and_tensor_types(report: dict[str, Any]) -> None:
    text = printed(report)
    assert "90.0 MB, 33.5 % of the original, 6.10 bits a weight" in line_with(text, "Size")
    report["targets"][0]["artifact"]["details"]["bits_per_weight_of_original"] = 5.987
    assert "6.10 bits a weight (5.99 if no layers were merged)" in line_with(printed(report), "Size")
    report["targets"][0]["artifact"]["details"]["bits_per_weight_of_original"] = 6.1  # none were merged
    assert "if no layers" not in printed(report)
    assert "30 → 27 layers" in line_with(text, "Merge")
    assert line_with(text, "Layers").endswith("0 … 19, 20+21+22, 23+24, 25 … 29")
    assert "160 Q5_0, 55 F32, 28 Q8_0" in line_with(text, "Tensors")
    assert "160 Q5_0, 62.0 % of the weights" in line_with(text, "Fallback")
    assert "merged 41 s, gguf-q4 kept; peak memory 1.70 GB" in text


def test_what_decided_the_depth_is_said(report: dict[str, Any]) -> None:
    assert "Depth" not in printed(report)
    why = "with 26 it is 1.61 (1.5 to 1.7), in torch"
    report["merge"]["depth"] = {"limit": "a perplexity ratio of at most 1.5", "limited_by": why, "tried": []}
    expected = f"Depth     27 layers are the limit of a perplexity ratio of at most 1.5: {why}"
    assert line_with(printed(report), "Depth") == expected


def test_continuations_stand_side_by_side_and_markup_is_inert(report: dict[str, Any]) -> None:
    line = line_with(printed(report), "[bold]sea[/bold]")
    assert "is blue and wide" in line
    assert "is grey [/nothing]" in line


def test_warnings_are_printed(report: dict[str, Any], target: dict[str, Any]) -> None:
    target["warnings"] = ["The perplexity exploded."]
    report["warnings"] = ["Something about the run."]
    text = printed(report)
    assert text.splitlines()[1] == "Warning: The perplexity exploded."  # right under the verdict
    assert "Warning: Something about the run." in text


def test_how_it_behaves_is_one_line(report: dict[str, Any]) -> None:
    assert line_with(printed(report), "Behaves").split("   ")[1] == (
        "chat template: pass; end of text: pass; repetition: inconclusive (repeats itself 0.14 → 0.35)"
    )


def test_tokenizers_that_differ_are_loud(report: dict[str, Any], target: dict[str, Any]) -> None:
    target["tokenizer"] = {"identical": False, "texts": 40, "first_difference": "token ids of 'a' differ"}
    assert "DIFFERENT: token ids of 'a' differ" in printed(report)


def test_a_target_without_figures(report: dict[str, Any], target: dict[str, Any]) -> None:
    report["merge"] = None
    target |= {"verdict": "fail", "error": "the runtime crashed", "artifact": None, "tokenizer": None}
    target |= NO_FIGURES
    lines = printed(report).splitlines()
    assert lines[0].split() == ["FAIL", "gguf-q4"]
    assert lines[1].strip() == "the runtime crashed"


def test_numbers_that_are_missing_or_huge(report: dict[str, Any], target: dict[str, Any]) -> None:
    target["steps"][0] |= {"perplexity": 31_234.5, "perplexity_se": None, "bits_per_byte": None}
    target["steps"][1] |= {"perplexity": math.inf, "perplexity_se": math.nan}
    target["steps"][2] |= {"perplexity": 3.2e9}
    target["comparisons"]["compression"]["ppl_ratio"] |= {"low": None, "high": None}
    text = printed(report)
    assert "31,234 " in line_with(text, "original", "torch, cpu")
    assert "–" in line_with(text, "merged", "torch, cpu")
    assert "3.200e+09" in line_with(text, "artifact", "llama.cpp, cpu")
    assert "1.260  ≤" in line_with(text, "perplexity ratio")


@pytest.mark.parametrize("width", [40, 80])
def test_narrow_terminals_lose_nothing(report: dict[str, Any], width: int) -> None:
    together = "".join(printed(report, width).split())
    for word in ("1.260", "0.2113", "81.23", "33.5%", "PASS"):
        assert word in together
