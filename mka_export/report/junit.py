"""``junit.xml``: a report as test results, for the page of a CI job.

A target is a testsuite, and each of its checks a testcase. JUnit knows no "inconclusive": such a check is a failure of
that type, as a gate must not open for it; what does not decide is skipped: a limit on a figure that tells nothing, and a
smoke check that is inconclusive. The layout is that of https://github.com/testmoapp/junitxml.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree as ET

from mka_export.errors import printable
from mka_export.report.figures import METRICS, figures, reasons

Element = ET.Element


@dataclass(frozen=True)
class _Case:
    """One testcase; ``outcome`` is a verdict, or ``skipped``."""

    group: str
    name: str
    outcome: str
    message: str = ""


def junit_xml(report: Mapping[str, Any]) -> bytes:
    """Return a report as JUnit XML in UTF-8.

    A testsuite has a testcase for the verdict, which fails wherever the exit code says so, one for the artifact (was it
    made, did it run), one for the tokenizer, one for each limit, and one for each smoke check.
    """
    root = ET.Element("testsuites", {"name": printable(f"mka-export {report['model']['name']}")})
    seconds = {stage["name"]: stage["seconds"] for stage in report["stages"] if not stage["reused"]}
    for target in report["targets"]:
        parts = (seconds.get(target["name"]), seconds.get(f"parity/{target['name']}"))
        _add_suite(root, report, target, sum(part or 0.0 for part in parts))
    totals = ("tests", "failures", "skipped")
    root.attrib |= {key: str(sum(int(suite.get(key, 0)) for suite in root)) for key in totals} | {"errors": "0"}
    ET.indent(root)
    written: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return written + b"\n"


def _add_suite(root: Element, report: Mapping[str, Any], target: Mapping[str, Any], seconds: float) -> None:
    cases = list(_cases(target))
    failed, skipped = (sum(c.outcome in group for c in cases) for group in (("fail", "inconclusive"), ("skipped",)))
    counts = {"tests": len(cases), "failures": failed, "errors": 0, "skipped": skipped}
    about = {"name": printable(target["name"]), **{key: str(n) for key, n in counts.items()}, "time": f"{seconds:.2f}"}
    suite = ET.SubElement(root, "testsuite", about)
    properties = ET.SubElement(suite, "properties")
    for key, value in _properties(report, target).items():
        ET.SubElement(properties, "property", {"name": printable(key), "value": printable(value)})
    for case in cases:
        name = {"classname": printable(f"{target['name']}.{case.group}"), "name": printable(case.name), "time": "0"}
        element = ET.SubElement(suite, "testcase", name)
        if case.outcome == "skipped":
            ET.SubElement(element, "skipped", {"message": printable(case.message)})
        elif case.outcome != "pass":
            failure = ET.SubElement(element, "failure", {"type": case.outcome, "message": printable(case.message)})
            failure.text = printable(case.message)


def _cases(target: Mapping[str, Any]) -> Iterator[_Case]:
    error, tokenizer, smoke = target.get("error"), target["tokenizer"], target.get("smoke")
    yield _Case("verdict", "verdict", target["verdict"], " ".join(reasons(target)))
    yield _Case("artifact", "made and run", "fail" if error else "pass", error or "")
    if tokenizer is not None:
        outcome = "pass" if tokenizer["identical"] else "fail"
        yield _Case("tokenizer", "same token ids", outcome, tokenizer["first_difference"] or "")
    for figure in figures(target):
        checks = target["comparisons"][figure.kind]["checks"]
        reason = next((check["reason"] for check in checks if check["metric"] == figure.key), None)
        if figure.verdict is not None:
            yield _Case(figure.kind, figure.metric.name, figure.verdict, reason or "")
        elif figure.metric.limit in target["comparisons"][figure.kind]["limits"]:
            yield _Case(figure.kind, figure.metric.name, "skipped", f"{figure.text}: tells nothing, does not decide")
    for check in smoke["checks"] if smoke else ():
        outcome = "skipped" if check["verdict"] == "inconclusive" else check["verdict"]
        yield _Case("smoke", check["name"].replace("_", " "), outcome, check["reason"])


def _properties(report: Mapping[str, Any], target: Mapping[str, Any]) -> dict[str, str]:
    runtime, source = target["runtime"], report["model"]["source"]
    found = {
        "model": f"{source['kind']} {source['id']}",
        "runtime": " ".join((runtime["name"], runtime["device"], *runtime["versions"].values())),
        "mka-export": report["tool"]["mka-export"],
    }
    found |= {f"{figure.kind} {METRICS[figure.key].name}": figure.text for figure in figures(target)}
    return found
