"""The similarity of the layers under merge, by one measure; only what a merge changed is computed again."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mka_export.merge.measures import MEASURES, Kept
from mka_export.merge.trajectory import Trajectory
from mka_export.progress import Task
from mka_export.publish import save_array

NODES = 1024


class Similarities:
    """S of the layers of a model under merge.

    Args:
        probe: the model, on some windows.
        measure: a name in ``MEASURES``.
    """

    def __init__(self, probe: Trajectory, measure: str) -> None:
        self.probe, self._measure, self._name = probe, MEASURES[measure], measure
        self._known = 0  # what is kept of this many layers is on disk
        # Token positions, the same in every layer; never the first token of a window, whose massive activations
        # would decide every distance.
        windows, tokens = probe.ids.shape
        count = min(NODES, windows * (tokens - 1))
        chosen = np.sort(np.random.default_rng(0).choice(windows * (tokens - 1), count, replace=False))
        self._nodes = torch.from_numpy(np.stack(np.divmod(chosen, tokens - 1))) + torch.tensor([[0], [1]])

    def neighbours(self) -> list[float]:
        """S of each layer and the next."""
        return [self._measure.compare(one, other) for one, other in pairwise(self._kept())]

    def matrix(self, task: Task | None = None) -> NDArray[np.float64]:
        """S of every two layers: (layers, layers), symmetric, ones on the diagonal."""
        kept = self._kept(task)
        matrix = np.eye(len(kept))
        for i, upper in enumerate(kept):
            for j, lower in enumerate(kept[:i]):
                matrix[i, j] = matrix[j, i] = self._measure.compare(lower, upper)
        return matrix

    def forget(self, position: int) -> None:
        """Follow a merge: the layers from ``position`` on have changed."""
        self._known = min(self._known, position)

    def _kept(self, task: Task | None = None) -> list[Kept]:
        """Return what is kept of every layer: maps of files, not in memory however many layers there are."""
        for position in range(self._known, len(self.probe.layers)):
            states = self.probe.nodes_after(position, self._nodes).double().numpy()
            save_array(self._file(position), self._measure.keep(states))
            if task is not None:
                task.advance()
        self._known = len(self.probe.layers)
        return [np.load(self._file(position), mmap_mode="r") for position in range(self._known)]

    def _file(self, position: int) -> Path:
        return self.probe.folder / f"{self._name}-{position}.npy"
