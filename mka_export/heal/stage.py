"""The heal stage: from a merged checkpoint to a trained one, with its losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from safetensors import safe_open

from mka_export.heal.distill import Healed, Healing, distill, distill_bytes
from mka_export.heal.teacher import ask_teacher, teacher_need
from mka_export.models.activations import calibrate
from mka_export.models.checkpoint import CONFIG, Checkpoint
from mka_export.models.checkpoint_writer import CheckpointWriter, copy_tokenizer
from mka_export.models.outline import Outline
from mka_export.models.runner import LayerRunner
from mka_export.needs import Need
from mka_export.progress import Progress
from mka_export.publish import write_json

ACTIVATIONS, LOSSES, CURVE = "activations.safetensors", "losses.json", "losses.png"
STATISTICS_WINDOWS = 4  # whose column statistics the converters are given


def heal_need(original: Outline, shallow: Outline, windows: int, tokens: int) -> Need:
    """Return what distilling takes, of so many windows of so many tokens: it holds the whole shallow model."""
    teacher = teacher_need(original, windows * tokens)
    kept = 2 * (3 + 1) * 4 * shallow.parameters  # weights, two moments and the best weights, before old ones go
    return Need(
        kept=shallow.nbytes,
        scratch=teacher.kept + kept,
        memory=max(teacher.memory, distill_bytes(shallow, tokens)),
    )


def heal_stage(
    original: LayerRunner,
    merged: Checkpoint,
    spans: Sequence[Sequence[int]],
    windows: NDArray[np.int64],
    calibration: Mapping[str, Any],
    healing: Healing,
    out: Path,
    pieces: Path,
    progress: Progress,
) -> None:
    """Distil the original into a merged checkpoint, and write the results into the existing empty folder ``out``.

    Args:
        spans: first and last original layer of each of the merged checkpoint's layers.
        windows: training token ids (N, T).
        calibration: where they are from; ``sha256`` among it.
        pieces: where the original's answers and the state of the training are kept, and taken from if an earlier run
            with the same inputs was killed.

    Raises:
        MkaError: what ``ask_teacher`` and ``distill`` raise.
    """
    ids = torch.from_numpy(windows)
    teacher = ask_teacher(original, ids, pieces, progress)
    several = [layer for layer, (first, last) in enumerate(spans) if last > first]
    healed = distill(merged, ids, teacher, healing, several, original.device, pieces, progress)
    _write_checkpoint(merged, healed, out)
    runner = LayerRunner(Checkpoint.open(out), str(original.device))
    few = ids[:: max(1, len(ids) // STATISTICS_WINDOWS)]
    calibrate(runner, few, str(calibration["sha256"]), progress).save(out / ACTIVATIONS)
    looks = [{"step": step, "kl": kl} for step, kl in healed.held_out.items()]
    about = {"method": "distill", **asdict(healing), "calibration": dict(calibration)}
    write_json(out / LOSSES, {**about, "losses": healed.losses, "held_out": looks, "best": healed.best})
    _draw(healed, out / CURVE)


def _write_checkpoint(merged: Checkpoint, healed: Healed, out: Path) -> None:
    with safe_open(healed.weights, framework="pt") as weights, CheckpointWriter(out) as writer:
        for name in merged.shards:
            writer.add(name, weights.get_tensor(name).to(merged.tensor(name).dtype))
    write_json(out / CONFIG, merged.config)
    copy_tokenizer(merged.path, out)
    card = (merged.path / "README.md").read_text(encoding="utf-8")
    (out / "README.md").write_text(f"{card}\nThen distilled from the original: see {LOSSES}.\n", encoding="utf-8")


def _draw(healed: Healed, path: Path) -> None:
    """Draw the loss of every step, and the held-out KL."""
    figure = Figure(figsize=(8, 4.5), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps = range(1, len(healed.losses) + 1)
    axes.plot(
        steps, healed.losses, color="tab:grey", alpha=0.6, linewidth=1, label="loss of a step (KL + hidden states)"
    )
    axes.plot(*zip(*healed.held_out.items(), strict=True), marker="o", color="tab:blue", label="KL, held-out windows")
    axes.axvline(healed.best, color="tab:green", linestyle=":", label=f"kept: step {healed.best}")
    axes.set(xlabel="step", ylabel="nats", ylim=(0, None))
    axes.grid(visible=True, alpha=0.25)
    axes.legend()
    figure.savefig(path, metadata={"Software": None})
