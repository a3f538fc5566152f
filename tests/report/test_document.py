from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from full_report import NO_FIGURES
from jsonschema import Draft202012Validator

from mka_export.errors import MkaError
from mka_export.report import valid_report, write_reports
from mka_export.report.document import FORMAT, SCHEMA, VERSION


def test_the_schema_is_one_and_names_this_version() -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["properties"]["format"]["const"] == FORMAT
    assert schema["properties"]["version"]["const"] == VERSION


def test_a_report_is_written_as_it_is(report: dict[str, Any], tmp_path: Path) -> None:
    written = write_reports(report, tmp_path)
    assert written == report == json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))


def test_a_report_without_merge_or_figures_is_one(report: dict[str, Any], target: dict[str, Any]) -> None:
    report["merge"] = None
    target |= {"verdict": "fail", "error": "it crashed", "artifact": None, "tokenizer": None}
    target |= NO_FIGURES
    assert valid_report(report) == report


def test_numbers_that_are_not_finite_become_null_and_are_told(
    report: dict[str, Any], target: dict[str, Any], tmp_path: Path
) -> None:
    target["steps"][2]["perplexity"] = math.inf
    target["comparisons"]["compression"]["kl"]["mean"] = math.nan
    written = write_reports(report, tmp_path)
    assert written["targets"][0]["steps"][2]["perplexity"] is None
    assert written["warnings"] == [
        "targets.0.steps.2.perplexity was inf: written as null",
        "targets.0.comparisons.compression.kl.mean was nan: written as null",
    ]
    json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["warnings"] == []  # the caller's report is left alone


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda r: r.pop("stages"), "its top level"),
        (lambda r: r.update(version=2), "version"),
        (lambda r: r["targets"][0].update(verdict="good"), "targets.0.verdict"),
        (lambda r: r["targets"][0].update(spelled_wrong=1), "targets.0"),
        (lambda r: r["model"].update(layers=2.5), "model.layers"),
        (lambda r: r["evaluation"].update(sha256="xyz"), "evaluation.sha256"),
        (lambda r: r["merge"]["layers"].append([1]), "merge.layers.30|merge"),
        (lambda r: r["targets"][0]["comparisons"].update(other={}), "targets.0.comparisons"),
    ],
)
def test_what_breaks_the_schema_is_named_and_not_written(
    report: dict[str, Any], change: Any, where: str, tmp_path: Path
) -> None:
    change(report)
    with pytest.raises(MkaError, match=f"breaks its schema at ({where})"):
        write_reports(report, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(report: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(MkaError, match="cannot write .*report.json: No such file"):
        write_reports(report, tmp_path / "absent")
