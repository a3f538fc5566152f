"""The similarity of all layers as a picture, before and after merging."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray


def draw_heatmaps(
    before: NDArray[np.float64], after: NDArray[np.float64], spans: Sequence[Sequence[int]], path: Path
) -> None:
    """Draw two similarity matrices (layers, layers) next to each other as a PNG file.

    Args:
        spans: first and last original layer of each remaining layer, its label on the right.
    """
    figure = Figure(figsize=(13, 6.2), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    low = float(min(before.min(), after.min()))
    labels = ([str(i) for i in range(len(before))], [str(a) if a == b else f"{a}–{b}" for a, b in spans])
    titles = (f"before: {len(before)} layers", f"after: {len(after)} layers")
    for axes, matrix, names, title in zip((left, right), (before, after), labels, titles, strict=True):
        image = axes.imshow(matrix, vmin=low, vmax=1.0, cmap="viridis", origin="upper")
        every = max(1, len(names) // 32)
        ticks = [i for i in range(len(names)) if i % every == 0 or "–" in names[i]]
        axes.set_xticks(ticks, [names[i] for i in ticks], rotation=90, fontsize=7)
        axes.set_yticks(ticks, [names[i] for i in ticks], fontsize=7)
        axes.set_title(title)
        axes.set_xlabel("layer (of the original)")
    left.set_ylabel("layer (of the original)")
    figure.colorbar(
        image, ax=[left, right], shrink=0.8, label="similarity S: normalised mutual information of the diffusion maps"
    )
    figure.savefig(path, metadata={"Software": None})
