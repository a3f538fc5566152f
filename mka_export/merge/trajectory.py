"""The residual stream of the calibration text at every layer boundary, on disk.

The original model's states are kept as what later layers should still see. The model under merge shares
them up to its first merged layer; what follows is run again only as far as it is asked for, so that
a merge costs the layers after it and no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mka_export.models.activations import Activations, ColumnStatistics
from mka_export.models.runner import LayerRunner, check_finite
from mka_export.progress import Progress

GRAPH_NODES = 1024


@dataclass(frozen=True)
class Layer:
    """A layer of the model under merge.

    Attributes:
        first, last: the span of original layers it stands for (both included).
        file: its weights where they are not those of original layer ``first``.
    """

    first: int
    last: int
    file: Path | None = None

    @property
    def span(self) -> list[int]:
        """First and last original layer."""
        return [self.first, self.last]


class Trajectory:
    """States and layers of the model under merge.

    Args:
        runner: runs the original model's layers, and layers with other weights.
        ids: calibration windows (N, T).
        folder: an empty folder for the states: (layers + 1) · N · T · hidden · 4 bytes, and as much
            again for the part of the model that was merged.

    Attributes:
        layers: the model under merge, bottom up.
        layer_runs: how many times a layer was run over the whole calibration text.
    """

    def __init__(self, runner: LayerRunner, ids: Tensor, folder: Path, progress: Progress) -> None:
        self.runner, self.ids, self.folder, self.progress = runner, ids, folder, progress
        self.layers = [Layer(i, i) for i in range(runner.checkpoint.num_layers)]
        self.layer_runs = 0
        self._statistics: list[ColumnStatistics] = []
        self._shape = (*ids.shape, runner.checkpoint.hidden_size)
        # A few hundred to a few thousand token positions, the same in every layer; never the first
        # token of a window, whose massive activations would decide every distance.
        generator = np.random.default_rng(0)
        count = min(GRAPH_NODES, ids.shape[0] * (ids.shape[1] - 1))
        nodes = np.sort(generator.choice(ids.shape[0] * (ids.shape[1] - 1), count, replace=False))
        self._nodes = torch.from_numpy(np.stack(np.divmod(nodes, ids.shape[1] - 1)))
        self._nodes[1] += 1
        self._write(self._original(0), slice(0, len(ids)), runner.embed(ids))
        self._known = 0  # boundaries up to here hold the states of the model under merge
        self._shared = 0  # boundaries up to here are those of the original, stored once
        with progress.task("original over the calibration text", len(self.layers)) as task:
            for position in range(len(self.layers)):
                self._shared = position + 1
                self._run(position)
                task.advance()

    @property
    def windows(self) -> int:
        """How many calibration windows there are."""
        return self._shape[0]

    def batches(self) -> Iterator[slice]:
        """Cut the windows into batches that fit in memory."""
        return self.runner.batches(self._shape[0], self._shape[1])

    def weights(self, position: int) -> dict[str, Tensor]:
        """Return the float32 weights of the layer now at ``position``."""
        layer = self.layers[position]
        if layer.file is None:
            return self.runner.weights(layer.first)
        return {name: t.to(self.runner.device) for name, t in load_file(layer.file).items()}

    def before(self, position: int, batch: slice) -> Tensor:
        """Return the states that enter the layer at ``position`` of the model under merge: (batch, T, hidden)."""
        self._advance(position)
        return self._read(self._current(position), batch)

    def target(self, position: int, batch: slice) -> Tensor:
        """Return the *original* model's states after the span of the layer at ``position``."""
        return self._read(self._original(self.layers[position].last + 1), batch)

    def nodes_after(self, position: int) -> Tensor:
        """Return the states after ``position`` at the graph's nodes: (nodes, hidden) float32."""
        self._advance(position + 1)
        path, found = self._current(position + 1), []
        for batch in self.batches():
            window, token = self._nodes
            here = (window >= batch.start) & (window < batch.stop)
            found.append(self._read(path, batch)[window[here] - batch.start, token[here]])
        return torch.cat(found).cpu()

    def activations(self, calibration: str) -> Activations:
        """Return the column statistics of the model as it is now; ``calibration`` is the windows' sha256."""
        self._advance(len(self.layers))
        name = self.runner.checkpoint.architecture.layer_name
        found = {name(i, k): v for i, s in enumerate(self._statistics) for k, v in s.mean_square.items()}
        return Activations(found, self.ids.numel(), calibration)

    def replace(self, position: int, weights: dict[str, Tensor]) -> None:
        """Put one layer with ``weights`` in the place of the layers at ``position`` and ``position + 1``."""
        first, last = self.layers[position].first, self.layers[position + 1].last
        file = self.folder / f"merged-{first}-{last}.safetensors"
        save_file({name: t.cpu().contiguous() for name, t in weights.items()}, file)
        self._advance(position)
        self.layers[position : position + 2] = [Layer(first, last, file)]
        self._known = position
        self._shared = min(self._shared, position)

    def _advance(self, boundary: int) -> None:
        while self._known < boundary:
            self._run(self._known)

    def _run(self, position: int) -> None:
        weights, kind = self.weights(position), self.layers[position].first
        source, out = self._current(position), self._current(position + 1)
        statistics = ColumnStatistics()
        for batch in self.batches():
            with self.runner.watch(kind, statistics):
                states = self.runner.run_layer(kind, weights, self._read(source, batch))
            check_finite(states, f"layer {position}, on the calibration text,")
            self._write(out, batch, states)
        self._statistics[position:] = [statistics]
        self._known = position + 1
        self.layer_runs += 1

    def _original(self, boundary: int) -> Path:
        return self.folder / f"original-{boundary}.f32"

    def _current(self, boundary: int) -> Path:
        return self._original(boundary) if boundary <= self._shared else self.folder / f"merged-{boundary}.f32"

    def _read(self, path: Path, batch: slice) -> Tensor:
        # Plain reads and not a memory map: pages of a map count as the process's memory.
        per_window = self._shape[1] * self._shape[2]
        count, offset = (batch.stop - batch.start) * per_window, batch.start * per_window * 4
        flat = np.fromfile(path, dtype=np.float32, count=count, offset=offset)
        return torch.from_numpy(flat).view(-1, *self._shape[1:]).to(self.runner.device)

    def _write(self, path: Path, batch: slice, states: Tensor) -> None:
        with path.open("r+b" if path.exists() else "wb") as f:
            f.seek(batch.start * self._shape[1] * self._shape[2] * 4)
            states.cpu().contiguous().numpy().tofile(f)
