"""``report.html``: a report as one page that needs nothing but itself.

Templates are in ``templates/``. Whatever comes from models and files is escaped by the template engine, and the page
forbids itself scripts and anything from elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from mka_export.needs import size
from mka_export.report import charts, svg
from mka_export.report.command import command
from mka_export.report.figures import METRICS, figures, paper_ratio, questions_source, reasons, with_interval
from mka_export.report.terminal import model_line, number, spans_text, text_source

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).with_name("templates")
SIGNIFICANT = 0.05  # share of false discoveries among the groups that are marked


def report_html(report: Mapping[str, Any]) -> str:
    """Return a report, as ``valid_report`` returned it, as a page. A section without figures is left out."""
    whole = _whole(report)
    return _environment().get_template("report.html").render(report=whole, targets=whole["targets"])


def _whole(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``report`` with every field that it may lack, empty, so that a template finds what it asks for."""
    merge = report["merge"] and {"similarity": None, "layers": [], **report["merge"]}
    source = {"revision": None, "files": {}, **report["model"]["source"]}
    empty: dict[str, Any] = {
        "error": None,
        "mmlu": None,
        "attribution": [],
        "profile": None,
        "speed": None,
        "smoke": None,
    }
    return {
        "mmlu": None,
        "shard": None,
        **report,
        "merge": merge,
        "model": {"licence": None, **report["model"], "source": source},
        "targets": [{**empty, **target} for target in report["targets"]],
    }


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=_visible,
        undefined=StrictUndefined,
        extensions=["jinja2.ext.do"],
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"number": number, "size": size, "interval": with_interval, "source": text_source}
    made.globals |= {
        "charts": charts,
        "exp": math.exp,
        "svg": svg,
        "command": command,
        "figures": figures,
        "headlines": _headlines,
        "reasons": reasons,
        "questions_source": questions_source,
        "paper_ratio": paper_ratio,
        "model_line": model_line,
        "spans_text": spans_text,
        "by_category": _by_category,
        "parted": _parted,
        "curves": _curves,
        "SIGNIFICANT": SIGNIFICANT,
    }
    return made


def _visible(value: object) -> object:
    """Return what a template writes with control characters spelled out: in XML and HTML they may not be."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in value)


def _headlines(target: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures against the original that stand beside the verdict, by metric."""
    found = {figure.key: figure for figure in figures(target) if figure.kind == "compression"}
    return {key: found[key] for key in METRICS if key in found}


def _by_category(mmlu: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], list[Mapping[str, Any]]]]:
    """Return each category with its subjects, those that changed significantly first."""
    return [
        (
            category,
            sorted(
                (subject for subject in mmlu["subjects"] if subject["category"] == category["category"]),
                key=lambda subject: (_q(subject) >= SIGNIFICANT, subject["name"]),
            ),
        )
        for category in mmlu["categories"]
    ]


def _q(group: Mapping[str, Any]) -> float:
    return 1.0 if group["q"] is None else float(group["q"])


def _parted(first: str, second: str) -> tuple[str, str, str]:
    """Return what two texts begin with in common, whole words of it, and the rest of each."""
    length = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    while 0 < length < max(len(first), len(second)) and not first[length - 1].isspace():
        length -= 1
    return first[:length], first[length:], second[length:]


def _curves(position: list[Mapping[str, Any]]) -> dict[str, list[tuple[float, float | None]]]:
    """Return the perplexity of each step along the windows: name -> (middle of a range of positions, perplexity)."""
    names = list(dict.fromkeys(name for part in position for name in part["perplexity"]))
    middles = [(part["first"] + part["last"]) / 2 for part in position]
    return {name: [(x, p["perplexity"].get(name)) for x, p in zip(middles, position, strict=True)] for name in names}
