"""Statistics of what goes into a layer's linear modules."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mka_export.models.checkpoint import save_tensors
from mka_export.workspace import publish_file


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

    def save(self, path: Path) -> None:
        """Write to a safetensors file."""
        with publish_file(path) as writing:
            save_tensors(self._sums, writing, {"rows": json.dumps(self._rows)})

    @classmethod
    def load(cls, path: Path) -> ColumnStatistics:
        """Read what ``save`` wrote."""
        found = cls()
        with safe_open(path, framework="pt") as f:
            found._rows = json.loads(f.metadata()["rows"])
            found._sums = {name: f.get_tensor(name) for name in found._rows}
        return found

    @property
    def mean_square(self) -> dict[str, Tensor]:
        """Weight name inside the layer -> (in_features,) float32."""
        return {f"{path}.weight": (total / self._rows[path]).float().cpu() for path, total in self._sums.items()}
