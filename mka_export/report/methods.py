"""Methods side by side: a table for the terminal, and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mka_export.report.terminal import NONE, interval, number, text_source

PANELS = {  # figure -> title, scale
    "ppl_ratio": ("perplexity / original's", "log"),
    "bits_per_byte": ("bits a byte", "linear"),
    "mean_kl": ("mean KL from the original, nats", "log"),
    "mmlu": ("right answers to MMLU", "linear"),  # where it was asked
}
MARKERS = "osD^vP*X<>"
WIDTH = 150  # of the table where stdout is no terminal

Found = Mapping[str, Any]  # as comparison.json has it


def print_methods(found: Found) -> None:
    """Print a comparison on stdout, for each number of layers the best first."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    for line in _about(found):
        console.print(Text(line), soft_wrap=True)
    console.print(_table(found))
    for row in found["results"]:
        if "error" in row:
            console.print(
                Text(f"{row['name']}, {row['layers']} layers: {row['error']}", style="yellow"), soft_wrap=True
            )


def _about(found: Found) -> Iterator[str]:
    model, evaluation, calibration = found["model"], found["evaluation"], found["calibration"]
    yield f"Model       {model['name']} ({model['source']['kind']} {model['source']['id']}): {model['layers']} layers"
    yield f"Calibrated  on {calibration['tokens']:,} tokens of {text_source(calibration['source'])}"
    if mmlu := found["mmlu"]:
        yield f"Asked       {mmlu['questions']} questions of MMLU, {mmlu['shots']}-shot, from {mmlu['source']}"
    yield (
        f"Measured    in torch on {evaluation['windows']} windows of {evaluation['window_tokens']} tokens of "
        f"{text_source(evaluation['text'])}; 95 % intervals, paired over windows"
    )


def _table(found: Found) -> Table:
    table, original = Table(box=box.SIMPLE_HEAD, pad_edge=False), found["original"]
    table.add_column("layers", justify="right")
    table.add_column("method", no_wrap=True)
    headings = (
        "perplexity",
        "to the original's",
        f"to {found['against']}'s",
        "mean KL",
        "bits a byte",
        *(["MMLU"] if found["mmlu"] else []),
        "seconds",
        "GB",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    first = [
        str(found["model"]["layers"]),
        "original",
        _with_error(original),
        *[""] * 3,
        number(original["bits_per_byte"]),
        *_known(original),
    ]
    table.add_row(*first, end_section=True)
    rows = sorted(found["results"], key=lambda row: -row["layers"])
    for layers, group in groupby(rows, key=lambda row: row["layers"]):
        ranked = sorted(group, key=lambda row: row.get("perplexity") or float("inf"))
        for row in ranked:
            style = "bold" if row is ranked[0] else None
            table.add_row(str(layers), row["name"], *_cells(row), style=style, end_section=row is ranked[-1])
    return table


def _cells(row: Mapping[str, Any]) -> list[str]:
    if "error" in row:
        return [NONE]
    against = row["ppl_against"]
    return [
        _with_error(row),
        interval(row["ppl_ratio"]).plain,
        interval(against).plain if against else "",
        number(row["mean_kl"]["value"], 3),
        number(row["bits_per_byte"]),
        *_known(row),
        number(row["seconds"], 3),
        number(row["peak_memory_bytes"], 3, 1e-9),
    ]


def _known(row: Mapping[str, Any]) -> list[str]:
    """Return the cell for MMLU, where it was asked."""
    if (mmlu := row["mmlu"]) is None:
        return []
    return [interval(mmlu["accuracy"], 100, " %").plain + (", guessing" if mmlu["at_chance"] else "")]


def _with_error(row: Mapping[str, Any]) -> str:
    return f"{number(row['perplexity'])} ± {number(row['perplexity_se'], 2)}"


def draw_methods(found: Found, paths: Sequence[Path]) -> None:
    """Draw a comparison, as ``comparison.json`` has it, into files of the kinds of their suffixes."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    panels = {key: about for key, about in PANELS.items() if key != "mmlu" or found["mmlu"]}
    figure = Figure(figsize=(5 * len(panels), 5.6), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(row["name"] for row in found["results"]))
    for axes, (key, (title, scale)) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for number_, name in enumerate(names):
            points = list(_points(found, name, key))
            if points:
                layers, values, below, above = zip(*points, strict=True)
                ours = {"linewidth": 2.6, "markersize": 8, "zorder": 3} if name == found["against"] else {}
                marker = MARKERS[number_ % len(MARKERS)]
                axes.errorbar(layers, values, yerr=[below, above], label=name, marker=marker, capsize=2, **ours)
        axes.set(title=title, yscale=scale, xlabel=f"layers kept, of {found['model']['layers']}")
        if scale == "log":
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.invert_xaxis()
        axes.grid(visible=True, which="both", alpha=0.25)
    figure.axes[0].axhline(1.0, color="grey", linewidth=0.8)
    figure.axes[1].axhline(found["original"]["bits_per_byte"], color="grey", linewidth=0.8)
    if found["mmlu"]:
        figure.axes[3].axhline(found["original"]["mmlu"]["accuracy"]["value"], color="grey", linewidth=0.8)
        figure.axes[3].axhline(0.25, color="grey", linewidth=0.8, linestyle=":")  # guessing
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(5, len(names)))
    figure.suptitle(f"{found['model']['name']}: methods on the same tokens, with 95 % intervals")
    with mpl.rc_context({"svg.hashsalt": "mka-export"}):  # else ids of elements are random
        for path in paths:
            stamp = {"Date": None} if path.suffix == ".svg" else {"Software": None}
            figure.savefig(path, metadata=stamp)


def _points(found: Found, name: str, key: str) -> Iterator[tuple[int, float, float, float]]:
    """Yield layers, value, and how far its interval reaches down and up, of a method's results."""
    for row in found["results"]:
        if row["name"] == name and "error" not in row:
            given = row[key]["accuracy"] if key == "mmlu" else row[key]
            figure = given if isinstance(given, Mapping) else {"value": given, "low": None, "high": None}
            value = figure["value"]
            if value is not None:
                low, high = (value if figure[end] is None else figure[end] for end in ("low", "high"))
                yield row["layers"], value, value - low, high - value
