"""What models reached on the tasks of lm-evaluation-harness, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mka_export.errors import printable
from mka_export.report.terminal import COLOURS, number


def print_evaluation(found: Mapping[str, Any], console: Console) -> None:
    """Print what the pipeline's evaluation found, a table for each task or group; differences are to the original."""
    models = found["models"]
    differences = {(each["model"], each["task"], each["metric"]): each for each in found["differences"]}
    for name in dict.fromkeys(name for model in models for name in model["tasks"]):
        results = {model["name"]: model["tasks"][name] for model in models if name in model["tasks"]}
        first = next(iter(results.values()))
        about = f"{first['documents']:,} documents, {first['shots']}-shot"
        metrics = {model: task["metrics"] for model, task in results.items()}
        _print(
            name,
            about,
            metrics,
            {(m, key): each for (m, task, key), each in differences.items() if task == name},
            console,
        )
    for name in dict.fromkeys(name for model in models for name in model["groups"]):
        metrics = {model["name"]: model["groups"][name] for model in models if name in model["groups"]}
        _print(name, "all of the group", metrics, {}, console)
    for model in models:
        runtime = model["runtime"]
        versions = ", ".join(f"{name} {version}" for name, version in runtime["versions"].items())
        where = f" on {runtime['device']}" if runtime["device"] else ""
        console.print(Text(f"{model['name']}: {runtime['name']}{where} ({versions})"), soft_wrap=True)
        if model["error"]:
            console.print(Text(f"  {model['error']}", style=COLOURS["fail"]), soft_wrap=True)


def _print(
    name: str,
    about: str,
    metrics: Mapping[str, Mapping[str, Any]],
    differences: Mapping[tuple[str, str], Mapping[str, Any]],
    console: Console,
) -> None:
    console.print(Text.assemble((printable(name), "bold"), f"  {about}"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("metric", "model", "value"):
        table.add_column(heading)
    if differences:
        for heading in ("difference, 95 %", "lost,\ngained", "p"):
            table.add_column(heading)
    for metric in next(iter(metrics.values())):
        for i, (model, figures) in enumerate(metrics.items()):
            cells = _difference(differences.get((model, metric)))
            table.add_row("" if i else metric, model, _value(figures[metric]), *cells)
    console.print(table)


def _value(figures: Mapping[str, Any]) -> str:
    error = figures["stderr"]
    return number(figures["value"]) + (f" ± {number(error, 2)}" if error is not None else "")


def _difference(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return []
    value, low, high = (f"{found['difference'][key]:+.3f}" for key in ("value", "low", "high"))
    p = "< 0.001" if found["p"] < 0.001 else f"{found['p']:.3f}"
    return [f"{value} ({low} to {high})", f"{found['lost']}, {found['gained']}", p]
