from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from full_report import enrich

from mka_export.report import valid_report
from mka_export.report.page import report_html

SECTIONS = ["verdict", "loss", "limits", "layers", "mmlu", "profile", "sizes", "samples", "smoke", "heal", "reproduce"]


def page(report: dict[str, Any]) -> ET.Element:
    """The page as an XML parser reads it: every element closed, every attribute quoted, nothing left unescaped."""
    return ET.fromstring(report_html(valid_report(report)))


def section(report: dict[str, Any], name: str) -> ET.Element:
    (found,) = page(report).findall(f".//section[@id='{name}']")
    return found


def text(element: ET.Element) -> str:
    return " ".join(" ".join(element.itertext()).split())


def sections(report: dict[str, Any]) -> list[str]:
    return [str(each.get("id")) for each in page(report).iter("section")]


@pytest.fixture
def full(report: dict[str, Any]) -> dict[str, Any]:
    return enrich(report)


def test_every_section_in_its_order_and_linked(full: dict[str, Any]) -> None:
    assert sections(full) == SECTIONS
    assert [a.get("href") for a in page(full).iter("a")] == [f"#{name}" for name in SECTIONS[1:]]


def test_sections_without_figures_are_left_out(report: dict[str, Any], target: dict[str, Any]) -> None:
    target |= {"profile": None, "attribution": []}
    assert sections(report) == ["verdict", "loss", "limits", "layers", "sizes", "samples", "smoke", "reproduce"]
    report |= {"merge": None}
    target |= {"verdict": "fail", "error": "it crashed", "artifact": None, "tokenizer": None}
    target |= {"steps": [], "comparisons": {}, "samples": [], "smoke": None}
    assert sections(report) == ["verdict", "reproduce"]
    assert "it crashed" in text(section(report, "verdict"))
    assert "null" not in report_html(valid_report(report))


def test_the_verdict_and_why(full: dict[str, Any]) -> None:
    passed = full["targets"][0]
    failed = copy.deepcopy(passed) | {"name": "gguf-q3", "verdict": "fail", "warnings": ["It exploded."]}
    failed["comparisons"]["compression"]["checks"][0] |= {"verdict": "fail", "reason": "1.9 is over 1.35"}
    full["targets"].append(failed)
    first, second = (text(each) for each in section(full, "verdict").iter("article"))
    assert first.startswith("pass gguf-q4 Every limit is kept")
    assert "compression perplexity ratio 1.26 (at most 1.35)" in first
    assert second.startswith("fail gguf-q3 1.9 is over 1.35")
    assert "perhaps" not in first
    assert "It exploded." in second


def test_a_smoke_check_that_is_inconclusive_is_a_note_beside_the_verdict(report: dict[str, Any]) -> None:
    verdict = section(report, "verdict")
    assert text(next(verdict.iter("article"))).startswith("pass gguf-q4 Every limit is kept")
    assert [text(note) for note in verdict.iter("p") if note.get("class") == "warning"] == [
        "It perhaps repeats itself more."
    ]


def test_without_limits_nothing_is_said_to_be_kept(report: dict[str, Any], target: dict[str, Any]) -> None:
    for comparison in target["comparisons"].values():
        comparison |= {"checks": [], "limits": {}}
    assert "No limit was set" in text(section(report, "verdict"))


def test_figures_stand_beside_their_charts(full: dict[str, Any]) -> None:
    limits = text(section(full, "limits"))
    assert "1.260 (1.220 to 1.310) at most 1.35: pass" in limits
    assert "MMLU drop" in limits
    loss = text(section(full, "loss"))
    assert "original → merged" in loss
    assert "+0.220, ×1.246" in loss
    assert "together" in loss
    assert "36 asked" not in loss
    assert "33.5 % of the original" in text(section(full, "sizes"))
    assert "38.2" in text(section(full, "sizes"))
    assert "mka-export smollm2-135m --ratio 0.1" in text(section(full, "reproduce"))


def test_the_bits_of_the_original_are_told_where_they_are_others(full: dict[str, Any]) -> None:
    details = full["targets"][0]["artifact"]["details"]
    details |= {"bits_per_weight": 6.1, "bits_per_weight_of_original": 5.987}
    assert "6.10 (5.99 if no layers were merged)" in text(section(full, "sizes"))
    details["bits_per_weight_of_original"] = 6.1  # none were merged
    assert "if no layers" not in text(section(full, "sizes"))


def test_a_subject_that_changed_is_marked_and_first(full: dict[str, Any]) -> None:
    mmlu = section(full, "mmlu")
    opened = [each for each in mmlu.iter("details") if each.get("open")]
    assert len(opened) == 1
    (group,) = opened
    first = group.findall(".//div[@class='row sure']")
    assert "★ high school geography" in text(first[0])
    assert "9 lost, 1 gained, q = 0.034" in text(first[0])
    assert len([row for row in mmlu.iter("div") if str(row.get("class")).startswith("row")]) >= 61


def test_of_a_part_of_the_work_no_command_is_told(full: dict[str, Any]) -> None:
    full["shard"] = {"index": 2, "count": 8}
    assert "part 2 of 8 of the work" in text(page(full))
    assert "--ratio" not in text(section(full, "reproduce"))


def test_a_reason_is_told_once(full: dict[str, Any]) -> None:
    target = full["targets"][0]
    target["smoke"]["checks"][0] |= {"verdict": "fail", "reason": "It never stops."}
    target |= {"verdict": "fail", "error": "It never stops."}
    assert text(section(full, "verdict")).count("It never stops.") == 1


def test_a_model_at_chance_is_said_to_tell_nothing(full: dict[str, Any]) -> None:
    full["targets"][0]["mmlu"]["comparisons"]["compression"]["informative"] = False
    assert "answers no better than by guessing" in text(section(full, "mmlu"))


def test_heat_maps_frame_what_was_merged(full: dict[str, Any]) -> None:
    before, after = section(full, "layers").findall(".//{*}svg[@class='square']")
    assert (before.get("viewBox"), after.get("viewBox")) == ("0 0 30 30", "0 0 27 27")
    frames = [r for r in before if r.get("class") == "frame"]
    assert [(r.get("x"), r.get("width")) for r in frames] == [("20", "3"), ("23", "2")]
    cells = "".join(str(p.get("d")) for p in before if str(p.tag).endswith("path"))
    assert sum(map(int, re.findall(r"M\d+ \d+h(\d+)", cells))) == 900


def test_charts_have_titles_and_descriptions(full: dict[str, Any]) -> None:
    for chart in page(full).iter("{http://www.w3.org/2000/svg}svg"):
        assert chart.findtext("{http://www.w3.org/2000/svg}title")
        assert chart.find("{http://www.w3.org/2000/svg}desc") is not None


@pytest.mark.parametrize(
    "bad",
    [
        "<script>alert(1)</script>",
        "</style><img src=x onerror=alert(1)>",
        "{{ 7 * 7 }}",
        '"onload="x',
        "a\x00\x1b[31m\ud800",
    ],
)
def test_text_from_models_and_files_is_only_text(full: dict[str, Any], bad: str) -> None:
    target = full["targets"][0]
    target["samples"][0] |= {"prompt": bad, "original": bad, "artifact": f"{bad} and more"}
    target["warnings"] = [bad]
    target["mmlu"]["subjects"][0]["name"] = bad
    full["model"]["name"] = full["model"]["source"]["id"] = full["evaluation"]["text"] = bad
    full["model"]["licence"] = {"id": bad, "name": bad, "link": f"javascript:{bad}", "files": {}}
    target["comparisons"]["compression"]["checks"][0] |= {"verdict": "fail", "reason": bad}
    shown = page(full)
    tags = {each.tag.rpartition("}")[2] for each in shown.iter()}
    assert not tags & {"script", "img", "iframe", "object", "form"}
    assert not any(name.startswith("on") for each in shown.iter() for name in each.attrib)
    said = bad.replace("\x00", "\\x00").replace("\x1b", "\\x1b").replace("\ud800", "\\ud800")
    assert said in text(shown)


def test_nothing_comes_from_elsewhere(full: dict[str, Any]) -> None:
    written = report_html(valid_report(full))
    shown = ET.fromstring(written)
    links = [value for each in shown.iter() for name, value in each.attrib.items() if name in ("href", "src")]
    assert all(link.startswith("#") or link == "data:," for link in links)
    assert "url(" not in written
    assert "@import" not in written
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", written)
    policy = shown.find(".//meta[@http-equiv='Content-Security-Policy']")
    assert policy is not None
    assert str(policy.get("content")).startswith("default-src 'none'")


def test_it_stays_small_for_a_deep_model_and_ten_targets(full: dict[str, Any]) -> None:
    wavy = [[abs((i * 37 + j * 11) % 100) / 100 for j in range(80)] for i in range(80)]
    full["merge"]["similarity"] = {"before": wavy, "after": wavy}
    full["targets"] = [full["targets"][0] | {"name": f"target-{i}"} for i in range(10)]
    assert len(report_html(valid_report(full))) < 2_500_000


def test_figures_that_are_missing_are_dashes(full: dict[str, Any], tmp_path: Path) -> None:
    def without_numbers(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: without_numbers(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [without_numbers(v, key) for v in value]
        return None if isinstance(value, float) and key != "edges" else value

    full["targets"] = [without_numbers(each) for each in full["targets"]]
    full["merge"]["similarity"] = without_numbers(full["merge"]["similarity"])
    full["heal"] = without_numbers(full["heal"])
    assert "–" in text(section(full, "limits"))
