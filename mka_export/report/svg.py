"""The marks that charts are made of, which the macro ``chart`` of ``templates/macros.html`` writes out as SVG.

Horizontal places are percents of the chart's width and vertical ones pixels, so that a chart is as wide as the page lets
it, and its text and dots keep their size on a phone and on a desktop. Colours are classes of ``templates/report.css``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Marks = list["Mark"]


@dataclass(frozen=True)
class Mark:
    """One SVG element: its tag, its attributes, and its text."""

    tag: str
    attributes: Mapping[str, str]
    text: str = ""


@dataclass(frozen=True)
class Chart:
    """What is drawn, and what is said to those who cannot see it.

    Attributes:
        height: in pixels; 0 for a square that is scaled as a whole.
        title: what it shows, in a few words.
        description: what there is to be seen.
        marks: in the order in which they are drawn.
        view: for a square, its side in cells.
    """

    height: int
    title: str
    description: str
    marks: Sequence[Mark]
    view: int = 0


@dataclass(frozen=True)
class Scale:
    """Turns values between ``low`` and ``high`` into percents of the width; what lies beyond is put on the edge."""

    low: float
    high: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the place of ``value``, 0 to 100."""
        low, high, at = (self._measured(v) for v in (self.low, self.high, value))
        return round(min(100.0, max(0.0, 100 * (at - low) / (high - low))), 2)

    def _measured(self, value: float) -> float:
        return math.log(max(value, 1e-300)) if self.log else value

    @property
    def ticks(self) -> list[float]:
        """Two to eight round numbers on the scale."""
        if self.log and self.high / self.low >= 4:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            digits = (1, 2, 5) if self.high / self.low < 500 else (1,)
            marks = [float(f"{digit}e{power}") for power in powers for digit in digits]
            return [mark for mark in marks if self.low <= mark <= self.high]
        step = _round_step((self.high - self.low) / 4)
        first = math.ceil(self.low / step - 1e-9)
        return [round(i * step, 12) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def scale_around(values: Iterable[float | None], include: Sequence[float] = (), *, log: bool = False) -> Scale:
    """Return a scale with room around ``values``, those that are None left out, and ``include``."""
    known = [value for value in (*values, *include) if value is not None and (value > 0 or not log)]
    low, high = (min(known), max(known)) if known else (1.0, 2.0)
    if log:
        margin = max((high / low) ** 0.08, 1.02)
        return Scale(low / margin, high * margin, log=True)
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return Scale(low - (margin if low not in include or low else 0), high + margin)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= rough * 0.999)


def line(css: str, x1: float, y1: float, x2: float, y2: float) -> Mark:
    """Return a line; x in percents, y in pixels."""
    return Mark("line", {"class": css, "x1": f"{x1}%", "y1": f"{y1:g}", "x2": f"{x2}%", "y2": f"{y2:g}"})


def box(css: str, x1: float, x2: float, y: float, height: float) -> Mark:
    """Return a rectangle between two places."""
    left, width = min(x1, x2), round(abs(x2 - x1), 2)
    return Mark("rect", {"class": css, "x": f"{left}%", "y": f"{y:g}", "width": f"{width}%", "height": f"{height:g}"})


def dot(css: str, x: float, y: float, radius: float = 5) -> Mark:
    """Return a dot."""
    return Mark("circle", {"class": css, "cx": f"{x}%", "cy": f"{y:g}", "r": f"{radius:g}"})


def label(css: str, x: float, y: float, text: str, anchor: str = "middle", dx: int = 0) -> Mark:
    """Return a text, ``dx`` pixels from its place."""
    place = {"x": f"{x}%", "y": f"{y:g}", "dx": str(dx), "text-anchor": anchor}
    return Mark("text", {"class": css, **place}, text)


def whisker(css: str, scale: Scale, figure: Mapping[str, Any], y: float) -> Marks:
    """Return an interval as a line with ends; nothing where it is not known."""
    low, high = figure["low"], figure["high"]
    if low is None or high is None:
        return []
    left, right = scale(low), scale(high)
    ends = [line(css, x, y - 4, x, y + 4) for x in (left, right)]
    return [line(css, left, y, right, y), *ends]
