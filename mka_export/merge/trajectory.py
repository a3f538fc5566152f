"""The residual stream of some windows at every layer boundary, on disk.

The original model's states are kept as what later layers should still see. The model under merge shares
them up to its first merged layer. Both are run only as far as they are asked for, so that a merge costs
no more than the layers after it that matter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mka_export.hashes import file_sha256
from mka_export.merge.states import StatesFile
from mka_export.merge.steps import Choice
from mka_export.models.activations import Activations
from mka_export.models.finite import check_finite
from mka_export.models.runner import LayerRunner, Weights
from mka_export.models.statistics import ColumnStatistics
from mka_export.publish import seal, sealed


@dataclass(frozen=True)
class Layer:
    """A layer of the model under merge.

    Attributes:
        first: first and
        last: last original layer that it stands for.
        attention: the original layer whose attention it has, and which is run in its place with its weights.
        file: its weights where they are not those of that layer.
    """

    first: int
    last: int
    attention: int
    file: Path | None = None

    @property
    def span(self) -> list[int]:
        """First and last original layer."""
        return [self.first, self.last]


class Trajectory:
    """States of some windows in the original model and in the model under merge.

    Args:
        runner: runs the original model's layers, and layers with other weights.
        ids: token windows (N, T).
        windows: numbers of those that take part; all by default.
        folder: for the states: (layers + 1) · N · T · hidden · 4 bytes, and as much again for the part of the
            model that was merged. What an earlier run of the same model over the same windows finished of the
            original's is taken from there.

    Attributes:
        ids: the windows that take part.
        windows: their numbers.
        layers: the model under merge, bottom up.
        layer_runs: how many times a layer was run over all windows.
    """

    layers: list[Layer]
    _shared: int  # this many bottom layers are the original's, and so are their states
    _merged_known: int  # the last boundary whose states in the model under merge are there, where it is not shared
    _merged_statistics: list[ColumnStatistics]

    def __init__(self, runner: LayerRunner, ids: Tensor, folder: Path, windows: Sequence[int] | None = None) -> None:
        self.runner, self.folder = runner, folder
        self.windows = range(len(ids)) if windows is None else windows
        self.ids = ids[list(self.windows)]
        folder.mkdir(parents=True, exist_ok=True)
        self.layer_runs = 0
        self._updates: list[float] = []
        self._shape = (*self.ids.shape, runner.checkpoint.hidden_size)
        self._original_known = 0  # the last boundary whose states in the original are there
        self._original_statistics: list[ColumnStatistics] = []
        self.reset()
        self._key = hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()
        if self._finished(0) is None:
            self._write(self._original(0), slice(0, len(self.ids)), runner.embed(self.ids))
            seal(self._original(0).path, {"windows": self._key})

    @property
    def spans(self) -> list[list[int]]:
        """First and last original layer of each layer of the model under merge."""
        return [layer.span for layer in self.layers]

    def batches(self) -> Iterator[slice]:
        """Cut the windows into batches that fit in memory."""
        return self.runner.batches(self._shape[0], self._shape[1])

    def weights(self, position: int, *names: str) -> dict[str, Tensor]:
        """Return float32 weights of the layer now at ``position``: those called ``names``, or all."""
        layer = self.layers[position]
        if layer.file is None:
            return self.runner.weights(layer.attention, *names)
        with safe_open(layer.file, framework="pt", device=str(self.runner.device)) as f:
            return {name: f.get_tensor(name) for name in names or f.keys()}

    def before(self, position: int, batch: slice) -> Tensor:
        """Return the states that enter the layer at ``position`` of the model under merge: (batch, T, hidden)."""
        return self._read(self._states(position), batch)

    def original(self, boundary: int, batch: slice) -> Tensor:
        """Return the *original* model's states at a boundary: before its layer of that number, or after the last."""
        self._run_original(boundary)
        return self._read(self._original(boundary), batch)

    def nodes_after(self, position: int, nodes: Tensor) -> Tensor:
        """Return the states after ``position`` at some (window, token) nodes: (2, n) -> (n, hidden) float32."""
        file, (window, token), found = self._states(position + 1), nodes, []
        for batch in self.batches():
            here = (window >= batch.start) & (window < batch.stop)
            found.append(self._read(file, batch)[window[here] - batch.start, token[here]])
        return torch.cat(found).cpu()

    def above(self, position: int) -> Iterator[tuple[int, Callable[[], Weights]]]:
        """Yield the layers above ``position``, for ``outcome``."""
        for place in range(position + 1, len(self.layers)):
            yield self.layers[place].attention, partial(self.weights, place)

    def outcome(self, position: int, layers: Iterable[tuple[int, Callable[[], Weights]]]) -> Tensor:
        """Return the final states if from ``position`` on these layers stood: (N, T, hidden), all in memory.

        Args:
            layers: kind and weights of each.
        """
        states = [self.before(position, batch) for batch in self.batches()]
        for kind, weights in layers:
            loaded = weights()
            states = [self.runner.run_layer(kind, loaded, batch) for batch in states]
        return torch.cat(states)

    def largest_updates(self) -> list[float]:
        """Return, for each layer of the original, the largest ‖output − input‖ / ‖input‖ of any token."""
        self._run_original(self.runner.checkpoint.num_layers)
        return self._updates

    def activations(self, calibration: str) -> Activations:
        """Return the column statistics of the model as it is now; ``calibration`` is the windows' sha256."""
        self._states(len(self.layers))
        layers = [*self._original_statistics[: self._shared], *self._merged_statistics]
        name = self.runner.checkpoint.architecture.layer_name
        found = {name(i, k): v for i, layer in enumerate(layers) for k, v in layer.mean_square.items()}
        return Activations(found, self.ids.numel(), calibration)

    def attention(self, choice: Choice) -> int:
        """Return the original layer whose attention a merge leaves."""
        return self.layers[choice.position].attention if choice.attention is None else choice.attention

    def replace(self, choice: Choice, file: Path) -> None:
        """Put one layer, with the float32 weights in ``file``, in the place of those that a merge takes."""
        position, last = choice.position, choice.last
        merged = Layer(self.layers[position].first, self.layers[last].last, self.attention(choice), file)
        if position < self._shared:
            self._shared = self._merged_known = position
        self._merged_known = min(self._merged_known, position)
        del self._merged_statistics[self._merged_known - self._shared :]
        self.layers[position : last + 1] = [merged]

    def reset(self) -> None:
        """Make the model under merge the original again, and free the disk of what it was."""
        for file in self.folder.glob("merged-*.f32"):
            file.unlink()
        self.layers = [Layer(i, i, i) for i in range(self.runner.checkpoint.num_layers)]
        self._shared = len(self.layers)
        self._merged_known = 0
        self._merged_statistics = []

    def _states(self, boundary: int) -> StatesFile:
        """Return the file of the states at ``boundary`` of the model under merge, made if need be."""
        self._run_original(min(boundary, self._shared))
        while self._merged_known < boundary and boundary > self._shared:
            position = max(self._merged_known, self._shared)
            source, out = self._merged(position), self._merged(position + 1)
            self._merged_statistics.append(
                self._run(self.layers[position].attention, self.weights(position), source, out)
            )
            self._merged_known = position + 1
        return self._merged(boundary)

    def _run_original(self, boundary: int) -> None:
        for index in range(self._original_known, boundary):
            out = self._original(index + 1)
            saved = out.path.with_suffix(".statistics")
            if about := self._finished(index + 1):
                self._updates.append(about["update"])
                statistics = ColumnStatistics.load(saved)
            else:
                self._updates.append(0.0)
                weights, source = self.runner.weights(index), self._original(index)
                statistics = self._run(index, weights, source, out, self._note_update)
                statistics.save(saved)
                about = {"windows": self._key, "update": self._updates[-1], "statistics": file_sha256(saved)}
                seal(out.path, about)
            self._original_statistics.append(statistics)
            self._original_known = index + 1

    def _finished(self, boundary: int) -> dict[str, Any] | None:
        """Return what is known of the original's states at ``boundary`` where an earlier run finished them."""
        path = self._original(boundary).path
        about, saved = sealed(path), path.with_suffix(".statistics")
        if about is None or about["windows"] != self._key:
            return None
        return about if boundary == 0 or (saved.is_file() and file_sha256(saved) == about["statistics"]) else None

    def _note_update(self, before: Tensor, after: Tensor) -> None:
        update = float(((after - before).norm(dim=-1) / before.norm(dim=-1).clamp_min(1e-12)).max())
        self._updates[-1] = max(self._updates[-1], update)

    def _run(
        self,
        kind: int,
        weights: dict[str, Tensor],
        source: StatesFile,
        out: StatesFile,
        note: Callable[[Tensor, Tensor], None] | None = None,
    ) -> ColumnStatistics:
        statistics = ColumnStatistics()
        for batch in self.batches():
            before = self._read(source, batch)
            states = self.runner.run_layer(kind, weights, before, statistics)
            check_finite(states, f"layer {kind}", self.windows[batch])
            if note is not None:
                note(before, states)
            self._write(out, batch, states)
        self.layer_runs += 1
        return statistics

    def _original(self, boundary: int) -> StatesFile:
        return StatesFile(self.folder / f"original-{boundary}.f32", self._shape[2])

    def _merged(self, boundary: int) -> StatesFile:
        if boundary <= self._shared:
            return self._original(boundary)
        return StatesFile(self.folder / f"merged-{boundary}.f32", self._shape[2])

    def _read(self, file: StatesFile, batch: slice) -> Tensor:
        tokens = self._shape[1]
        states = file.read(slice(batch.start * tokens, batch.stop * tokens))
        return states.view(-1, *self._shape[1:]).to(self.runner.device)

    def _write(self, file: StatesFile, batch: slice, states: Tensor) -> None:
        file.write(batch.start * self._shape[1], states.flatten(0, 1))
