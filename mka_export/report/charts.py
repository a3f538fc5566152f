"""The charts of ``report.html``: figures of a report become marks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, groupby, pairwise
from typing import Any

from mka_export.report.svg import Chart, Mark, Marks, Scale, box, dot, label, line, scale_around, whisker

Step = Mapping[str, Any]

ROW = 30  # pixels: height of a row's chart
LEVELS = 12  # colours of a heat map
PLOT = 200  # pixels: height of a plot with two axes
TICK_LABELS = 20  # pixels below it
LABEL_GAP = 15  # pixels between the labels of two lines
MAX_POINTS = 120  # of a line: a longer one is averaged


def against_limit(figure: Mapping[str, Any], neutral: float, name: str, said: str) -> Chart:
    """Draw a figure with its interval against its limit; what is beyond the limit is shaded.

    Args:
        figure: ``value``, ``low``, ``high``, ``limit`` (None for none), ``at_most`` and ``verdict``.
        neutral: where nothing would have changed, marked too.
        name: of the figure.
        said: the figure in words.
    """
    limit, middle = figure["limit"], ROW / 2
    bounds = [neutral] if limit is None else [neutral, limit]
    scale = scale_around((figure["value"], figure["low"], figure["high"]), bounds)
    marks = [line("axis", 0, middle, 100, middle)]
    if limit is not None:
        beyond = (scale(limit), 100.0) if figure["at_most"] else (0.0, scale(limit))
        marks += [box("beyond", *beyond, 2, ROW - 4), line("limit", scale(limit), 2, scale(limit), ROW - 2)]
    marks.append(line("neutral", scale(neutral), 8, scale(neutral), ROW - 8))
    colour = figure["verdict"] or "artifact"
    marks += whisker(f"whisker {colour}", scale, figure, middle)
    if figure["value"] is not None:
        marks.append(dot(f"dot {colour}", scale(figure["value"]), middle))
    return Chart(ROW, name, said, marks)


def waterfall(steps: Sequence[Step], *, more_is_worse: bool) -> list[tuple[Step, Chart]]:
    """Draw what each step changed, from where the one before it ended: one chart for a row, all on one scale.

    A last row holds the sum, without an interval.
    """
    changes = [step["change"]["value"] or 0.0 for step in steps]
    starts = [0.0, *accumulate(changes)]
    total: Step = {"name": "together", "change": {"value": starts[-1], "low": None, "high": None}}
    rows = [*zip(steps, starts, starts[1:], strict=False), (total, 0.0, starts[-1])]
    reached = [start + (step["change"][key] or 0.0) for step, start, _ in rows for key in ("low", "high")]
    scale = scale_around((*starts, *reached), [0.0])
    drawn = []
    for step, start, end in rows:
        css = "worse" if (end > start) == more_is_worse else "better"
        interval = {
            key: None if step["change"][key] is None else start + step["change"][key] for key in ("low", "high")
        }
        marks = [
            line("neutral", scale(0), 0, scale(0), ROW),
            box(f"bar {css}" + (" total" if step is total else ""), scale(start), scale(end), 7, ROW - 14),
            *whisker("whisker strong", scale, interval, ROW / 2),
        ]
        if step is not total:
            marks.append(line("joint", scale(end), ROW - 7, scale(end), ROW))
        drawn.append((step, Chart(ROW, f"Change by step {step['name']}", f"{end - start:+.4g}", marks)))
    return drawn


def two_dots(group: Mapping[str, Any]) -> Chart:
    """Draw the original's and the artifact's share of right answers, with intervals, from 0 to 1; chance is marked."""
    scale, chance = Scale(0.0, 1.0), 0.25
    marks = [line("grid", scale(tick), 0, scale(tick), ROW) for tick in (0, 0.5, 1)]
    marks.append(line("chance", scale(chance), 0, scale(chance), ROW))
    for side, y in (("original", 9), ("artifact", 21)):
        marks += whisker(f"whisker {side}", scale, group[side], y)
        if group[side]["value"] is not None:
            marks.append(dot(f"dot {side}", scale(group[side]["value"]), y, 4))
    said = ", ".join(f"{side} {100 * (group[side]['value'] or 0):.1f} %" for side in ("original", "artifact"))
    return Chart(ROW, f"Right answers: {group['name']}", said, marks)


def interval_row(figure: Mapping[str, Any], scale: Scale, name: str, mark: float) -> Chart:
    """Draw one figure with its interval on a scale shared with others; ``mark`` is a line through all."""
    marks = [line("axis", 0, ROW / 2, 100, ROW / 2), line("neutral", scale(mark), 0, scale(mark), ROW)]
    marks += whisker("whisker artifact", scale, figure, ROW / 2)
    if figure["value"] is not None:
        marks.append(dot("dot artifact", scale(figure["value"]), ROW / 2))
    return Chart(ROW, name, f"{figure['value']}", marks)


def bar(share: float, css: str, name: str) -> Chart:
    """Draw a share of the width."""
    return Chart(ROW, name, f"{100 * share:.0f} %", [box(f"bar {css}", 0, 100 * share, 7, ROW - 14)])


def training(heal: Mapping[str, Any]) -> Chart:
    """Draw the losses of healing, step by step, on text that was trained on and on text that was not."""
    series = {
        "trained": list(enumerate(heal["losses"], 1)),
        "held-out": [(look["step"], look["kl"]) for look in heal["held_out"]],
    }
    return lines(series, "Losses of healing", "mean KL from the original by step")


def lines(series: Mapping[str, Sequence[tuple[float, float | None]]], title: str, said: str) -> Chart:
    """Draw lines with their names at their right ends, on a log scale.

    Args:
        series: name, which is the class of its colour too -> (x, y) points, those without a y left out.
    """
    known = {name: _thinned([(x, y) for x, y in points if y is not None]) for name, points in series.items()}
    known = {name: points for name, points in known.items() if points}
    across = Scale(*_ends(x for points in known.values() for x, _ in points))
    up = scale_around((y for points in known.values() for _, y in points), log=True)

    def place(y: float) -> float:
        return round(PLOT * (1 - up(y) / 100), 1)

    marks: Marks = []
    for tick in up.ticks:
        marks += [
            line("grid", 0, place(tick), 100, place(tick)),
            label("tick", 0, place(tick) + 4, f"{tick:g}", "end", -6),
        ]
    marks += [label("tick", across(tick), PLOT + 16, f"{tick:g}") for tick in across.ticks]
    ends = []
    for name, points in known.items():
        for (x1, y1), (x2, y2) in pairwise(points):
            marks.append(line(f"line {name}", across(x1), place(y1), across(x2), place(y2)))
        if len(points) <= 40:
            marks += [dot(f"dot {name}", across(x), place(y), 2.5) for x, y in points]
        ends.append((place(points[-1][1]), name))
    marks += [label(f"name {name}", 100, y + 4, name, "start", 8) for y, name in _apart(ends)]
    return Chart(PLOT + TICK_LABELS, title, said, marks)


def histogram(edges: Sequence[float], counts: Sequence[int], title: str) -> Chart:
    """Draw shares of tokens by bin, the first and the last open."""
    total, most, height = sum(counts) or 1, max(counts) or 1, 110
    width = 100 / len(counts)
    marks: Marks = [line("axis", 0, height, 100, height)]
    for i, count in enumerate(counts):
        tall = round((height - 16) * count / most, 1)
        marks.append(box("bar artifact", i * width + 0.12 * width, (i + 1) * width - 0.12 * width, height - tall, tall))
        if i == counts.index(most):
            marks.append(label("tick", (i + 0.5) * width, height - tall - 4, f"{100 * count / total:.0f} %"))
    every = max(1, math.ceil(len(edges) / 6))
    for i in range(0, len(edges), every):
        x = round((i + 1) * width, 2)
        marks += [line("axis", x, height, x, height + 4), label("tick", x, height + 16, f"{edges[i]:.3g}")]
    return Chart(height + TICK_LABELS, title, f"{total} tokens in {len(counts)} bins", marks)


def heat_map(
    matrix: Sequence[Sequence[float | None]], scale: Scale, spans: Sequence[Sequence[int]], title: str
) -> Chart:
    """Draw a similarity matrix, layer 0 at the top left; what became one layer is framed.

    Cells of one colour are one path: even 80 layers are some tens of kilobytes.
    """
    paths: dict[int, list[str]] = {}
    for y, row in enumerate(matrix):
        x = 0
        for level, cells in groupby(row, key=lambda value: _level(value, scale)):
            count = len(list(cells))
            paths.setdefault(level, []).append(f"M{x} {y}h{count}v1h-{count}z")
            x += count
    marks = [Mark("path", {"class": f"heat{level}", "d": "".join(d)}) for level, d in sorted(paths.items())]
    for first, last in spans:
        place = {"x": f"{first}", "y": f"{first}", "width": f"{last - first + 1}", "height": f"{last - first + 1}"}
        marks += [Mark("rect", {"class": css, **place}) for css in ("casing", "frame")]
    side = len(matrix)
    letter = {"style": f"font-size:{side * 0.04:.2f}px", "class": "tick", "text-anchor": "end"}
    for layer in range(0, side, 5 if side <= 40 else 10):
        place = {"x": f"{-0.015 * side:.2f}", "y": f"{layer + 0.5 + 0.014 * side:.2f}"}
        marks.append(Mark("text", {**letter, **place}, str(layer)))
    said = f"{len(matrix)} by {len(matrix)} layers, similarities between {scale.low:.3g} and {scale.high:.3g}"
    return Chart(0, title, said, marks, view=len(matrix))


def merged_spans(spans: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Return the spans of more than one layer."""
    return [span for span in spans if span[1] > span[0]]


def heat_scale(*matrices: Sequence[Sequence[float | None]]) -> Scale:
    """Return the scale of the similarities of different layers: what a layer has with itself says nothing."""
    values = [v for m in matrices for y, row in enumerate(m) for x, v in enumerate(row) if x != y and v is not None]
    return Scale(*_ends(values))


def _level(value: float | None, scale: Scale) -> int:
    return -1 if value is None else min(LEVELS - 1, int(LEVELS * scale(value) / 100))


def _ends(values: Iterable[float]) -> tuple[float, float]:
    known = list(values) or [0.0]
    low, high = min(known), max(known)
    return (low, high) if high > low else (low, low + 1)


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average neighbours of a long line."""
    size = math.ceil(len(points) / MAX_POINTS)
    parts = [points[i : i + size] for i in range(0, len(points), size)] if size else []
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def _apart(ends: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Move labels down until none covers another, then all up as far as they left the plot."""
    placed: list[tuple[float, str]] = []
    for y, name in sorted(ends):
        placed.append((max(y, placed[-1][0] + LABEL_GAP) if placed else y, name))
    below = max(0.0, placed[-1][0] - PLOT) if placed else 0.0
    return [(y - below, name) for y, name in placed]
