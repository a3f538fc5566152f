"""The merge stage: from a checkpoint to a shallower checkpoint, its plan, heat map and activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mka_export.errors import UsageError
from mka_export.merge.fuse import METHODS
from mka_export.merge.heatmap import draw_heatmaps
from mka_export.merge.plan import Plan, Step
from mka_export.merge.similarity import Cells, cells, npib, similarity_matrix
from mka_export.merge.trajectory import Trajectory
from mka_export.models.checkpoint import (
    CONFIG,
    Checkpoint,
    CheckpointWriter,
    copy_tokenizer,
    require_finite,
    save_tensors,
)
from mka_export.models.runner import LayerRunner, on_finite_windows
from mka_export.progress import Progress, Task
from mka_export.workspace import publish_file, seal, sealed, write_json

PROBE_WINDOWS = 4
GRAPH_NODES = 1024
MASSIVE = 5.0  # times the stream before
STATES = "states-"
PLAN, ACTIVATIONS, SIMILARITY, HEATMAP = "plan.json", "activations.safetensors", "similarity.json", "similarity.png"


@dataclass(frozen=True)
class Settings:
    """What decides a merge.

    Attributes:
        remove: how many layers go.
        method: a name in ``METHODS``.
        schedule: ``iterative`` measures again after each merge, ``one-shot`` picks all pairs at once.
        protect: this many early layers take no part.
        alpha: weight of the lower layer in an average; None takes the similarity.
    """

    remove: int
    method: str
    schedule: str
    protect: int
    alpha: float | None


def layers_to_remove(ratio: float, layers: int, protect: int) -> int:
    """Turn a share of the layers into a number: the nearest, halves upwards, at least one.

    Raises:
        UsageError: the ratio is no share, or leaves fewer layers than are protected.
    """
    if not 0.0 < ratio < 1.0:
        raise UsageError(f"--ratio {ratio}: it is the share of layers to remove, between 0 and 1", "For example 0.2.")
    if not 0 <= protect < layers:
        raise UsageError(f"--protect {protect}: the model has {layers} layers")
    remove = max(1, int(ratio * layers + 0.5))
    if remove > layers - protect - 1:
        raise UsageError(
            f"--ratio {ratio} removes {remove} of {layers} layers; with the first {protect} protected at most "
            f"{layers - protect - 1} can go",
            "Lower --ratio or --protect.",
        )
    return remove


def merge_stage(
    runner: LayerRunner,
    windows: NDArray[np.int64],
    calibration: Mapping[str, Any],
    settings: Settings | Plan,
    out: Path,
    pieces: Path,
    progress: Progress,
) -> None:
    """Merge, and write the results into the existing empty folder ``out``.

    Args:
        windows: calibration token ids (N, T).
        calibration: where they are from, for the plan; ``sha256`` among it.
        settings: how to choose, or a plan to replay.
        pieces: where the original's states and finished pairs are kept, and taken from if an earlier run with the
            same inputs was killed.

    Raises:
        UsageError: there are not as many pairs as are to be merged.
        MkaError: the model is damaged, or too much of the text turns NaN or infinite in it.
    """
    checkpoint = runner.checkpoint
    for name in checkpoint.shards:  # those of the layers are checked when they first run; hours may lie between
        if checkpoint.architecture.split(name)[0] is None:
            require_finite(name, checkpoint.tensor(name))

    def work(ids: torch.Tensor) -> None:
        about = {**calibration, "tokens": ids.numel(), "left_out": len(windows) - len(ids)}
        _merge(runner, ids, about, settings, out, pieces, progress)

    on_finite_windows(torch.from_numpy(windows), work, progress)


def _merge(
    runner: LayerRunner,
    ids: torch.Tensor,
    calibration: Mapping[str, Any],
    settings: Settings | Plan,
    out: Path,
    pieces: Path,
    progress: Progress,
) -> None:
    checkpoint = runner.checkpoint
    folder = pieces / f"{STATES}{len(ids)}"  # fewer where windows were left out
    # All windows take part in a fit, and run only to the layers that are fitted; a few of them are
    # enough for the graph of the similarity, and run to the top after every merge.
    trajectory = Trajectory(runner, ids, folder / "all")
    probe = trajectory
    if len(ids) > PROBE_WINDOWS:
        probe = Trajectory(runner, ids, folder / "probe", every=len(ids) // PROBE_WINDOWS)
    view = _Similarities(probe)
    with progress.task("similarity of the layers", checkpoint.num_layers) as task:
        before = view.matrix(task)
    steps: list[Step] = []
    choices = _replay(settings, trajectory) if isinstance(settings, Plan) else _choose(settings, view)
    total = len(settings.steps) if isinstance(settings, Plan) else settings.remove
    with progress.task(f"merging {total} times ({settings.method})", total) as task:
        for position, similarity, alpha in choices:
            lower, upper = trajectory.layers[position].span, trajectory.layers[position + 1].span
            piece = _Piece(pieces, len(ids), [*steps, Step(lower, upper, similarity, alpha)])
            figures = piece.figures()
            if figures is None:
                figures = piece.keep(*METHODS[settings.method](trajectory, position, alpha))
            for each in {trajectory, probe}:
                each.replace(position, piece.weights)
            view.forget(position)
            steps.append(Step(lower, upper, similarity, alpha, figures))
            task.advance()
    model = {
        "architecture": checkpoint.architecture.name,
        "layers": checkpoint.num_layers,
        "fingerprint": checkpoint.fingerprint,
    }
    plan = Plan(model, settings.method, settings.schedule, settings.protect, calibration, steps)
    after = view.matrix()
    _write_checkpoint(trajectory, out)
    view.probe.activations(str(calibration["sha256"])).save(out / ACTIVATIONS)
    write_json(out / PLAN, plan.to_dict())
    write_json(
        out / SIMILARITY,
        {"measure": plan.measure, "before": before.round(6).tolist(), "after": after.round(6).tolist()},
    )
    draw_heatmaps(before, after, plan.layers(), out / HEATMAP)


class _Piece:
    """A finished merge on disk: the layer's weights, and what they follow from: windows, and steps up to it."""

    def __init__(self, folder: Path, windows: int, steps: list[Step]) -> None:
        self.weights = folder / f"pair-{len(steps)}.safetensors"
        self._from = {"windows": windows, "steps": [asdict(step) | {"figures": {}} for step in steps]}

    def figures(self) -> dict[str, float] | None:
        """Return the figures of the merge, or None where it is still to be made."""
        about = sealed(self.weights)
        return about["figures"] if about and about["from"] == self._from else None

    def keep(self, weights: Mapping[str, torch.Tensor], figures: dict[str, float]) -> dict[str, float]:
        """Write it; returns ``figures``."""
        with publish_file(self.weights) as writing:
            save_tensors(weights, writing)
        seal(self.weights, {"from": self._from, "figures": figures})
        return figures


class _Similarities:
    """The similarity of the layers under merge; only what a merge changed is computed again."""

    def __init__(self, probe: Trajectory) -> None:
        self.probe = probe
        self._cells: list[Cells] = []
        # Token positions as the graph's nodes, the same in every layer; never the first token of a
        # window, whose massive activations would decide every distance.
        windows, tokens = probe.ids.shape
        count = min(GRAPH_NODES, windows * (tokens - 1))
        chosen = np.sort(np.random.default_rng(0).choice(windows * (tokens - 1), count, replace=False))
        self._nodes = torch.from_numpy(np.stack(np.divmod(chosen, tokens - 1))) + torch.tensor([[0], [1]])

    def neighbours(self) -> list[float]:
        """S of each layer and the next."""
        self._complete()
        return [npib(one, other) for one, other in zip(self._cells, self._cells[1:], strict=False)]

    def massive_layers(self) -> list[int]:
        """Return the original layers that write massive activations, which every later layer's attention leans on.

        Such a layer multiplies the stream of a few tokens many times over (arXiv 2402.17762; 182 times in layer 11
        of SmolLM2-135M, where no layer after the first three passes 2.1 otherwise). To the other tokens it is a
        layer like any other, so no similarity warns of merging it.
        """
        self._complete()
        return [i for i, update in enumerate(self.probe.largest_update) if update > MASSIVE]

    def matrix(self, task: Task | None = None) -> NDArray[np.float64]:
        """S of every two layers."""
        self._complete(task)
        return similarity_matrix(self._cells)

    def forget(self, position: int) -> None:
        """Follow a merge: the layers from ``position`` on have changed."""
        del self._cells[position:]

    def _complete(self, task: Task | None = None) -> None:
        for position in range(len(self._cells), len(self.probe.layers)):
            self._cells.append(cells(self.probe.nodes_after(position, self._nodes).double().numpy()))
            if task is not None:
                task.advance()


def _choose(settings: Settings, view: _Similarities) -> Iterator[tuple[int, float, float]]:
    """Yield position, similarity and α of one merge after another.

    Raises:
        UsageError: there are not as many pairs as are to be merged.
    """
    left = _allowed(settings, view)
    if settings.remove > len(left):
        raise UsageError(
            f"{settings.remove} layers are to go, but only {len(left)} pairs of neighbours can be merged: the first "
            f"{settings.protect} layers are protected, and {view.massive_layers()} write massive activations",
            "Lower --ratio or --protect.",
        )

    def alpha(similarity: float) -> float:
        return similarity if settings.alpha is None else settings.alpha

    if settings.schedule == "iterative":
        for _ in range(settings.remove):
            similarities = view.neighbours()
            best = max(_allowed(settings, view), key=similarities.__getitem__)
            yield best, similarities[best], alpha(similarities[best])
    else:
        similarities = view.neighbours()
        order = sorted(left, key=similarities.__getitem__, reverse=True)
        # Bottom up, so that each merge sees the stream as the merges below it leave it; every one
        # moves the positions above it down by one.
        for done, pair in enumerate(sorted(order[: settings.remove])):
            yield pair - done, similarities[pair], alpha(similarities[pair])


def _allowed(settings: Settings, view: _Similarities) -> list[int]:
    """Return the positions whose layer may be merged with the next."""
    massive, layers = view.massive_layers(), view.probe.layers
    return [
        position
        for position in range(settings.protect, len(layers) - 1)
        if not any(layers[position].first <= index <= layers[position + 1].last for index in massive)
    ]


def _replay(plan: Plan, trajectory: Trajectory) -> Iterator[tuple[int, float, float]]:
    for step in plan.steps:
        position = [layer.span for layer in trajectory.layers].index(step.lower)
        yield position, step.similarity, step.alpha


def _write_checkpoint(trajectory: Trajectory, out: Path) -> None:
    checkpoint: Checkpoint = trajectory.runner.checkpoint
    architecture = checkpoint.architecture
    with CheckpointWriter(out) as writer:
        for name in checkpoint.shards:
            if architecture.split(name)[0] is None:
                writer.add(name, checkpoint.tensor(name))
        for position, layer in enumerate(trajectory.layers):
            stored = checkpoint.layer(layer.first)
            weights = stored if layer.file is None else trajectory.weights(position)
            for name, tensor in stored.items():
                writer.add(architecture.layer_name(position, name), weights[name].to("cpu", tensor.dtype))
    kept = [layer.first for layer in trajectory.layers]
    write_json(out / CONFIG, architecture.config_for_layers(checkpoint.config, kept))
    copy_tokenizer(checkpoint.path, out)
    _write_card(checkpoint.path / "README.md", out / "README.md", f"{len(kept)} of {checkpoint.num_layers} layers")


def _write_card(source: Path, out: Path, what: str) -> None:
    """Carry the front matter of a model card (licence, languages), with a line on what was done."""
    text = source.read_text(encoding="utf-8") if source.is_file() else ""
    front = text[: text.index("\n---", 3) + 4] + "\n\n" if text.startswith("---") and "\n---" in text[3:] else ""
    out.write_text(f"{front}# Merged\n\n{what}, merged by mka-export: see plan.json.\n", encoding="utf-8")
