"""Statistics of what goes into a layer's linear modules."""

from __future__ import annotations

import torch
from torch import Tensor


class ColumnStatistics:
    """Mean squares of the inputs of one layer's linear modules, gathered by ``LayerRunner.run_layer``."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._rows: dict[str, int] = {}

    def add(self, path: str, inputs: Tensor) -> None:
        """Add the input (batch, tokens, features) of module ``path``."""
        rows = inputs.flatten(0, -2)
        self._add(path, rows.square().sum(dim=0, dtype=torch.float64), len(rows))

    def include(self, other: ColumnStatistics) -> None:
        """Add all that ``other`` has seen."""
        for path, total in other._sums.items():
            self._add(path, total, other._rows[path])

    def _add(self, path: str, total: Tensor, rows: int) -> None:
        self._sums[path] = self._sums[path] + total if path in self._sums else total
        self._rows[path] = self._rows.get(path, 0) + rows

    @property
    def mean_square(self) -> dict[str, Tensor]:
        """Weight name inside the layer -> (in_features,) float32."""
        return {f"{path}.weight": (total / self._rows[path]).float().cpu() for path, total in self._sums.items()}
