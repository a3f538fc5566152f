"""The similarity of all layers as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import NDArray

from mka_export.merge.measures import MEASURES

Matrix = NDArray[np.float64]  # (layers, layers)


def draw_before_and_after(
    before: Matrix, after: Matrix, measure: str, spans: Sequence[Sequence[int]], path: Path
) -> None:
    """Draw two similarity matrices next to each other as a PNG file.

    Args:
        measure: a name in ``MEASURES``.
        spans: first and last original layer of each remaining layer, its label on the right.
    """
    figure = _figure(13, 6.2)
    left, right = figure.subplots(1, 2)
    low = float(min(before.min(), after.min()))
    labels = [str(a) if a == b else f"{a}–{b}" for a, b in spans]
    _draw(left, before, [str(i) for i in range(len(before))], f"before: {len(before)} layers", low)
    image = _draw(right, after, labels, f"after: {len(after)} layers", low)
    left.set_ylabel("layer (of the original)")
    figure.colorbar(image, ax=[left, right], shrink=0.8, label=f"similarity S: {MEASURES[measure].title}")
    figure.savefig(path, metadata={"Software": None})


def draw_measures(matrices: Mapping[str, Matrix], paths: Sequence[Path]) -> None:
    """Draw the same layers by several measures, each with its own colours, into files of the kinds of their suffixes."""
    columns = min(3, len(matrices))
    rows = -(-len(matrices) // columns)
    figure = _figure(5.2 * columns, 4.9 * rows)
    places = figure.subplots(rows, columns, squeeze=False).ravel()
    for place in places[len(matrices) :]:
        place.set_axis_off()
    for place, (name, matrix) in zip(places, matrices.items(), strict=False):
        labels = [str(i) for i in range(len(matrix))]
        image = _draw(place, matrix, labels, f"{name}\n{MEASURES[name].title}", float(matrix.min()))
        figure.colorbar(image, ax=place, shrink=0.8)
    with mpl.rc_context({"svg.hashsalt": "mka-export"}):  # else ids of elements are random
        for path in paths:
            stamp = {"Date": None} if path.suffix == ".svg" else {"Software": None}
            figure.savefig(path, metadata=stamp)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    return figure


def _draw(axes: Axes, matrix: Matrix, names: Sequence[str], title: str, low: float) -> AxesImage:
    image = axes.imshow(matrix, vmin=low, vmax=1.0, cmap="viridis", origin="upper")
    every = max(1, len(names) // 32)
    ticks = [i for i in range(len(names)) if i % every == 0 or "–" in names[i]]
    axes.set_xticks(ticks, [names[i] for i in ticks], rotation=90, fontsize=7)
    axes.set_yticks(ticks, [names[i] for i in ticks], fontsize=7)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("layer (of the original)")
    return image
