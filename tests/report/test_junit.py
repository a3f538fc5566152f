from __future__ import annotations

from typing import Any
from xml.etree import ElementTree as ET

import pytest
from full_report import enrich

from mka_export.report.junit import junit_xml


def suite(report: dict[str, Any]) -> ET.Element:
    (found,) = ET.fromstring(junit_xml(report))
    return found


def case(report: dict[str, Any], group: str, name: str) -> ET.Element:
    found = [c for c in suite(report).iter("testcase") if (c.get("classname"), c.get("name")) == (group, name)]
    assert len(found) == 1
    return found[0]


def test_a_report_that_passes_has_no_failures(report: dict[str, Any]) -> None:
    report = enrich(report)
    root = ET.fromstring(junit_xml(report))
    cases = list(root.iter("testcase"))
    assert [root.get(key) for key in ("tests", "failures", "errors", "skipped")] == [str(len(cases)), "0", "0", "0"]
    assert {c.get("classname") for c in cases} == {
        f"gguf-q4.{group}" for group in ("verdict", "artifact", "tokenizer", "conversion", "compression", "smoke")
    }
    assert all(len(c) == 0 for c in cases)


@pytest.mark.parametrize("verdict", ["fail", "inconclusive"])
def test_what_does_not_pass_is_a_failure_of_its_kind(
    report: dict[str, Any], target: dict[str, Any], verdict: str
) -> None:
    target["verdict"] = verdict
    target["comparisons"]["compression"]["checks"][0] |= {"verdict": verdict, "reason": "1.9 is over 1.35"}
    (failure,) = case(report, "gguf-q4.compression", "perplexity ratio")
    assert (failure.tag, failure.get("type"), failure.get("message")) == ("failure", verdict, "1.9 is over 1.35")
    assert case(report, "gguf-q4.verdict", "verdict")[0].get("type") == verdict
    assert suite(report).get("failures") == "2"
    assert len(case(report, "gguf-q4.conversion", "perplexity ratio")) == 0


def test_a_limit_that_tells_nothing_is_skipped(report: dict[str, Any], target: dict[str, Any]) -> None:
    target["comparisons"]["compression"]["checks"] = []
    (skipped,) = case(report, "gguf-q4.compression", "perplexity ratio")
    assert skipped.tag == "skipped"
    assert "1.26" in str(skipped.get("message"))
    assert suite(report).get("skipped") == "2"


def test_a_smoke_check_that_is_inconclusive_does_not_decide(report: dict[str, Any]) -> None:
    (skipped,) = case(report, "gguf-q4.smoke", "repetition")
    assert (skipped.tag, skipped.get("message")) == ("skipped", "It perhaps repeats itself more.")
    assert (suite(report).get("failures"), suite(report).get("skipped")) == ("0", "1")


def test_an_artifact_that_could_not_be_made(report: dict[str, Any], target: dict[str, Any]) -> None:
    target |= {"verdict": "fail", "error": "it crashed", "artifact": None, "tokenizer": None}
    target |= {"steps": [], "comparisons": {}, "samples": [], "smoke": None}
    assert case(report, "gguf-q4.artifact", "made and run")[0].get("message") == "it crashed"
    assert suite(report).get("tests") == "2"


def test_what_xml_cannot_hold_breaks_nothing(report: dict[str, Any], target: dict[str, Any]) -> None:
    target |= {"verdict": "fail", "error": "bad \x00 \x1b[31m \ufffe \ud800 <&> \"'\n]]>"}
    message = case(report, "gguf-q4.artifact", "made and run")[0].get("message")
    assert message == "bad \\x00 \\x1b[31m \\ufffe \\ud800 <&> \"'\\n]]>"


def test_time_is_that_of_stages_that_were_made(report: dict[str, Any]) -> None:
    report["stages"] = [
        {"name": "gguf-q4", "seconds": 9.0, "reused": True},
        {"name": "parity/gguf-q4", "seconds": 2.5, "reused": False},
    ]
    assert suite(report).get("time") == "2.50"
