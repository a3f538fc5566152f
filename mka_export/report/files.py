"""The files of a report: ``report.json`` and its forms for people and for CI, each written all or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mka_export.errors import MkaError
from mka_export.publish import publish_file, write_atomically
from mka_export.report.card import CARDS
from mka_export.report.document import valid_report
from mka_export.report.junit import junit_xml
from mka_export.report.page import report_html
from mka_export.report.summary import summary_markdown

REPORT, PAGE, JUNIT, SUMMARY = "report.json", "report.html", "junit.xml", "summary.md"
REPORT_FILES = (REPORT, PAGE, JUNIT, SUMMARY, CARDS)  # names in an output folder that nothing else may have


def write_reports(report: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write ``report.json``, ``report.html``, ``junit.xml`` and ``summary.md`` into ``folder``.

    Returns:
        ``valid_report(report)``, of which all are made.

    Raises:
        MkaError: the report does not follow its schema, or a file cannot be written.
    """
    valid = valid_report(report)
    texts = {
        PAGE: report_html(valid).encode(),
        JUNIT: junit_xml(valid),
        SUMMARY: summary_markdown(valid).encode(),
    }
    path = folder / REPORT
    try:
        write_atomically(path, valid)
        for name, text in texts.items():
            path = folder / name
            with publish_file(path) as writing:
                writing.write_bytes(text)
    except OSError as error:
        raise MkaError(f"cannot write {path}: {error.strerror}") from error
    return valid
