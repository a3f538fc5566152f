"""The merge stage: from a checkpoint to a shallower checkpoint, its plan, heat map and activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mka_export.errors import UsageError
from mka_export.merge.choose import Choice, Settings, Views
from mka_export.merge.heatmap import draw_before_and_after, draw_measures
from mka_export.merge.methods import METHODS
from mka_export.merge.plan import Plan, Step
from mka_export.merge.similarity import Similarities
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
from mka_export.progress import Progress
from mka_export.workspace import publish_file, seal, sealed, write_json

PROBE_WINDOWS = 4
STATES = "states-"
PLAN, ACTIVATIONS, SIMILARITY = "plan.json", "activations.safetensors", "similarity.json"
HEATMAP, HEATMAP_VECTORS = "similarity.png", "similarity.svg"


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
    probe = _probe(runner, ids, folder) if len(ids) > PROBE_WINDOWS else trajectory
    view = Similarities(probe, settings.measure)
    views = Views(trajectory, probe, view)
    method = METHODS[settings.method]
    with progress.task("similarity of the layers", checkpoint.num_layers) as task:
        before = view.matrix(task)
    steps: list[Step] = []
    choices = _replay(settings, trajectory) if isinstance(settings, Plan) else method.choose(settings, views)
    with progress.task(f"removing {settings.remove} layers ({settings.method})", settings.remove) as task:
        for choice in choices:
            position, last = choice.position, choice.last
            lower = trajectory.layers[position].span
            upper = [trajectory.layers[position + 1].first, trajectory.layers[last].last]
            step = Step(lower, upper, choice.similarity, choice.alpha)
            piece = _Piece(pieces, len(ids), [*steps, step])
            figures = piece.figures()
            if figures is None:
                figures = piece.keep(*method.fuse(trajectory, position, last, choice.alpha))
            for each in {trajectory, probe}:
                each.replace(position, last, piece.weights)
            view.forget(position)
            steps.append(replace(step, figures=figures))
            task.advance(last - position)
    plan = Plan(
        _about(checkpoint), settings.method, settings.measure, settings.schedule, settings.protect, calibration, steps
    )
    after = view.matrix()
    _write_checkpoint(trajectory, out)
    view.probe.activations(str(calibration["sha256"])).save(out / ACTIVATIONS)
    write_json(out / PLAN, plan.to_dict())
    write_json(
        out / SIMILARITY,
        {"measure": settings.measure, "before": before.round(6).tolist(), "after": after.round(6).tolist()},
    )
    draw_before_and_after(before, after, settings.measure, plan.layers(), out / HEATMAP)


def similarity_stage(
    runner: LayerRunner,
    windows: NDArray[np.int64],
    calibration: Mapping[str, Any],
    measures: Sequence[str],
    out: Path,
    pieces: Path,
    progress: Progress,
) -> None:
    """Measure how alike all layers are, as a merge would, and write matrices and pictures into ``out``.

    Args:
        measures: names in ``MEASURES``.

    The others, and what is raised, are those of ``merge_stage``.
    """
    layers = runner.checkpoint.num_layers

    def work(ids: torch.Tensor) -> dict[str, NDArray[np.float64]]:
        probe = _probe(runner, ids, pieces / f"{STATES}{len(ids)}")
        with progress.task("similarity of the layers", layers * len(measures)) as task:
            return {measure: Similarities(probe, measure).matrix(task) for measure in measures}

    matrices = on_finite_windows(torch.from_numpy(windows), work, progress)
    about = {"model": _about(runner.checkpoint), "calibration": calibration}
    write_json(out / SIMILARITY, {**about, "measures": {name: m.round(6).tolist() for name, m in matrices.items()}})
    draw_measures(matrices, [out / HEATMAP, out / HEATMAP_VECTORS])


def _probe(runner: LayerRunner, ids: torch.Tensor, folder: Path) -> Trajectory:
    """Return the model on a few of the windows, evenly spread."""
    return Trajectory(runner, ids, folder / "probe", every=max(1, len(ids) // PROBE_WINDOWS))


def _about(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "architecture": checkpoint.architecture.name,
        "layers": checkpoint.num_layers,
        "fingerprint": checkpoint.fingerprint,
    }


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


def _replay(plan: Plan, trajectory: Trajectory) -> Iterator[Choice]:
    for step in plan.steps:
        position, last = step.places([layer.span for layer in trajectory.layers])
        yield Choice(position, last, step.similarity, step.alpha)


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
