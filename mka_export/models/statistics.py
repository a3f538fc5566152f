"""Statistics of what goes into a layer's linear modules."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from mka_export.models.checkpoint_writer import save_tensors
from mka_export.publish import publish_file

if TYPE_CHECKING:
    from typing_extensions import Self


class InputStatistics(Protocol):
    """What ``LayerRunner.run_layer`` tells of the inputs of one layer's linear modules."""

    def empty(self) -> Self:
        """Return one like this that has seen nothing."""
        ...

    def add(self, path: str, inputs: Tensor) -> None:
        """Add the input (batch, tokens, features) of module ``path``."""
        ...

    def include(self, other: Self) -> None:
        """Add all that ``other`` has seen."""
        ...


class ColumnStatistics:
    """Mean squares of the inputs of one layer's linear modules."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._rows: dict[str, int] = {}

    def empty(self) -> ColumnStatistics:
        """Return one that has seen nothing."""
        return ColumnStatistics()

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


class Grams:
    """Gram matrices Σ x xᵀ of the inputs of some of one layer's linear modules; modules with the same input share one.

    Args:
        paths: of these modules.

    Attributes:
        tokens: how many the sums are over.
    """

    def __init__(self, paths: Collection[str]) -> None:
        self.tokens = 0
        self._paths = paths
        self._sums: dict[str, Tensor] = {}
        self._first: dict[str, str] = {}  # module -> the first one with the same input
        self._last: tuple[str, Tensor] | None = None

    def empty(self) -> Grams:
        """Return one for the same modules that has seen nothing."""
        return Grams(self._paths)

    def add(self, path: str, inputs: Tensor) -> None:
        """Add the input (batch, tokens, features) of module ``path``, if it is one of those."""
        if path not in self._paths:
            return
        if self._last is not None and self._last[1] is inputs:
            self._first[path] = self._last[0]
            return
        rows = inputs.flatten(0, -2)
        if not self._sums:
            self.tokens = len(rows)
        self._first[path], self._sums[path], self._last = path, rows.T @ rows, (path, inputs)

    def include(self, other: Grams) -> None:
        """Add all that ``other`` has seen."""
        self.tokens += other.tokens
        self._first |= other._first
        for path, total in other._sums.items():
            self._sums[path] = self._sums[path] + total if path in self._sums else total

    def __getitem__(self, path: str) -> Tensor:
        """Return the mean of x xᵀ over tokens for module ``path``: (in_features, in_features) float32."""
        return self._sums[self._first[path]] / self.tokens
