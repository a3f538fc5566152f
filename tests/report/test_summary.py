from __future__ import annotations

import copy
import html
import re
from typing import Any

import pytest
from full_report import enrich

from mka_export.report.markdown import SPECIAL, escape
from mka_export.report.summary import summary_markdown


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_the_verdicts_come_first(report: dict[str, Any], target: dict[str, Any]) -> None:
    report["targets"].append(copy.deepcopy(target) | {"name": "gguf-q3", "verdict": "fail", "error": "it crashed"})
    text = summary_markdown(report)
    first, _, passed, failed = rows(text)[:4]
    assert first[:4] == ["verdict", "target", "size", "perplexity ratio"]
    assert passed[:4] == ["✅ pass", "gguf-q4", "90.0 MB (33 % of the original)", "1.260 (1.220 to 1.310)"]
    assert failed[:2] == ["❌ fail", "gguf-q3"]
    assert "- gguf-q3: it crashed" in text.splitlines()


def test_figures_are_beside_their_limits(report: dict[str, Any]) -> None:
    found = rows(summary_markdown(enrich(report)))
    assert [
        "compression against original",
        "perplexity ratio",
        "1.260 (1.220 to 1.310)",
        "at most 1.35",
        "✅ pass",
    ] in found
    assert ["original", "41.2 % (38.3 to 44.1)", "–"] in found
    assert ["merged", "24.90", "0.9100", "torch, cpu"] in found


def test_every_table_has_as_many_cells_in_each_row_and_details_are_closed(report: dict[str, Any]) -> None:
    text = summary_markdown(enrich(report))
    for block in re.split(r"\n\n", text):
        widths = {len(row) for row in rows(block)}
        assert len(widths) <= 1
    assert text.count("<details>") == text.count("</details>") > 2


@pytest.mark.parametrize(
    "text", ["a|b", "`x`", "<script>alert(1)</script>", "[a](https://x.y)", "# h", "**b** _i_ ~s~ $m$"]
)
def test_what_models_say_is_shown_as_it_is(report: dict[str, Any], target: dict[str, Any], text: str) -> None:
    target["samples"][0]["artifact"] = f"{text}\nand\x00 more"
    target["warnings"] = [text]
    written = summary_markdown(report)
    assert text not in written
    assert html.unescape(escape(text)) == text
    (row,) = (row for row in rows(written) if "sea" in row[0])
    assert html.unescape(row[2]) == f"{text} and\\x00 more"


def test_escaped_text_has_no_markup_left() -> None:
    escaped = re.sub(r"&#\d+;", "", escape(f"{SPECIAL} https://x www.x"))
    assert not set(escaped) & set(SPECIAL)
    assert "://" not in escaped
