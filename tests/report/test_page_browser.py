"""The page in Chromium, on a phone and on a desktop, light and dark; look at the pictures after a change to it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from browser import BROWSER, screenshots, show
from full_report import enrich

from mka_export.report import valid_report
from mka_export.report.page import report_html

pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")


@pytest.mark.parametrize(("width", "dark"), [(360, False), (1280, True)], ids=["phone", "desktop-dark"])
def test_it_fits_and_the_console_is_silent(report: dict[str, Any], width: int, dark: bool, tmp_path: Path) -> None:
    full = enrich(report)
    other = copy.deepcopy(full["targets"][0]) | {"name": "another-target-with-a-name-that-is-as-long-as-it-may-be"}
    other["samples"][0]["artifact"] = "x" * 400  # a model that repeats itself knows no line breaks
    full["targets"].append(other)
    page = tmp_path / "report.html"
    page.write_text(report_html(valid_report(full)), encoding="utf-8")
    picture = screenshots() / f"report-{width}{'-dark' if dark else ''}.png"
    shown = show(page, width, picture, tmp_path, dark=dark)
    assert shown.console == []
    assert shown.width == width
    assert shown.scroll_width <= width
    assert shown.height > 5000
    assert picture.stat().st_size > 50_000
