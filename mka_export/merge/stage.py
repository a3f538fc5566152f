"""The merge stage: from a checkpoint to a shallower checkpoint, its plan, heat map and activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mka_export.errors import UsageError
from mka_export.merge.choose import Settings
from mka_export.merge.finished import Finished
from mka_export.merge.heatmap import draw_before_and_after, draw_measures
from mka_export.merge.measures import DEFAULT
from mka_export.merge.merging import merge, write_checkpoint
from mka_export.merge.plan import Plan
from mka_export.merge.similarity import Similarities
from mka_export.merge.steps import Step
from mka_export.merge.views import Views
from mka_export.models.checkpoint import Checkpoint
from mka_export.models.finite import on_finite_windows, require_finite
from mka_export.models.runner import LayerRunner
from mka_export.progress import Progress
from mka_export.publish import write_json

PLAN, ACTIVATIONS, SIMILARITY = "plan.json", "activations.safetensors", "similarity.json"
HEATMAP, HEATMAP_VECTORS = "similarity.png", "similarity.svg"


def require_share(option: str, ratio: float) -> None:
    """Raise ``UsageError`` unless the value of ``option`` is a share of layers that can go."""
    if not 0.0 < ratio < 1.0:
        raise UsageError(f"{option} {ratio}: it is the share of layers to remove, between 0 and 1", "For example 0.2.")


def layers_to_remove(ratio: float, layers: int, protect: int) -> int:
    """Turn a share of the layers into a number: the nearest, halves upwards, at least one.

    Raises:
        UsageError: the ratio is no share, or leaves fewer layers than are protected.
    """
    require_share("--ratio", ratio)
    most = removable(layers, protect)
    remove = max(1, int(ratio * layers + 0.5))
    if remove > most:
        raise UsageError(
            f"--ratio {ratio} removes {remove} of {layers} layers; with the first {protect} protected at most {most} "
            "can go",
            "Lower --ratio or --protect.",
        )
    return remove


def removable(layers: int, protect: int) -> int:
    """Return how many layers can go at most.

    Raises:
        UsageError: fewer layers than are protected.
    """
    if not 0 <= protect < layers:
        raise UsageError(f"--protect {protect}: the model has {layers} layers")
    return layers - protect - 1


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
        pieces: where the original's states and finished merges are kept, and taken from if an earlier run with the
            same inputs was killed.

    Raises:
        UsageError: there are not as many layers as are to go.
        MkaError: the model is damaged, or too much of the text turns NaN or infinite in it.
    """
    _check_ends(runner.checkpoint)

    def work(ids: torch.Tensor) -> None:
        views, finished = Views.of(runner, ids, settings.measure, pieces, pieces), Finished(pieces, len(ids))
        with progress.task("similarity of the layers", runner.checkpoint.num_layers) as task:
            before = views.similarities.matrix(task)
        merge(views, settings, finished, progress)
        plan = _plan(runner.checkpoint, settings, calibration, ids, finished.steps)
        after = views.similarities.matrix()
        write_checkpoint(views.everything, out)
        views.probe.activations(str(calibration["sha256"])).save(out / ACTIVATIONS)
        write_json(out / PLAN, plan.to_dict())
        write_json(
            out / SIMILARITY,
            {"measure": settings.measure, "before": before.round(6).tolist(), "after": after.round(6).tolist()},
        )
        draw_before_and_after(before, after, settings.measure, plan.layers(), out / HEATMAP)

    on_finite_windows(torch.from_numpy(windows), work, progress)


def dense_pass(runner: LayerRunner, windows: NDArray[np.int64], states: Path, progress: Progress) -> None:
    """Compute the original's states that every ``trial`` begins with, unless they are there; arguments are the same."""
    _check_ends(runner.checkpoint)

    def work(ids: torch.Tensor) -> None:
        views = Views.of(runner, ids, DEFAULT, states, states)
        with progress.task("states of the original", 4) as task:
            for trajectory in (views.everything, views.probe, views.echo, views.trial):
                trajectory.largest_updates()
                task.advance()

    on_finite_windows(torch.from_numpy(windows), work, progress)


def trial(
    runner: LayerRunner,
    windows: NDArray[np.int64],
    calibration: Mapping[str, Any],
    settings: Settings,
    out: Path,
    pieces: Path,
    states: Path,
    progress: Progress,
) -> tuple[Plan, float]:
    """Merge, and write only the checkpoint into the existing empty folder ``out``.

    Args:
        pieces: where finished merges are kept. Those of earlier runs are taken from there: with the same settings, or,
            where each merge follows from those before it (``Method.stepwise``), for another number of layers.
        states: where states are kept; those of the original are taken from there.

    The others, and what is raised, are those of ``merge_stage``.

    Returns:
        The plan, and the seconds that choosing and fusing took, those of earlier runs included.
    """

    def work(ids: torch.Tensor) -> tuple[Plan, float]:
        views, finished = Views.of(runner, ids, settings.measure, states, pieces), Finished(pieces, len(ids))
        merge(views, settings, finished, progress)
        write_checkpoint(views.everything, out)
        return _plan(runner.checkpoint, settings, calibration, ids, finished.steps), finished.seconds

    return on_finite_windows(torch.from_numpy(windows), work, progress)


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
        probe = Views.of(runner, ids, measures[0], pieces, pieces).probe
        with progress.task("similarity of the layers", layers * len(measures)) as task:
            return {measure: Similarities(probe, measure).matrix(task) for measure in measures}

    matrices = on_finite_windows(torch.from_numpy(windows), work, progress)
    about = {"model": _about(runner.checkpoint), "calibration": calibration}
    write_json(out / SIMILARITY, {**about, "measures": {name: m.round(6).tolist() for name, m in matrices.items()}})
    draw_measures(matrices, [out / HEATMAP, out / HEATMAP_VECTORS])


def _check_ends(checkpoint: Checkpoint) -> None:
    """Check the tensors outside of the layers; those inside are checked when they first run, hours later."""
    for name in checkpoint.shards:
        if checkpoint.architecture.split(name)[0] is None:
            require_finite(name, checkpoint.tensor(name))


def _plan(
    checkpoint: Checkpoint,
    settings: Settings | Plan,
    calibration: Mapping[str, Any],
    ids: torch.Tensor,
    steps: Sequence[Step],
) -> Plan:
    text = {**calibration, "tokens": ids.numel(), "left_out": calibration["tokens"] // ids.shape[1] - len(ids)}
    return Plan(
        _about(checkpoint), settings.method, settings.measure, settings.schedule, settings.protect, text, list(steps)
    )


def _about(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "architecture": checkpoint.architecture.name,
        "layers": checkpoint.num_layers,
        "fingerprint": checkpoint.fingerprint,
    }
