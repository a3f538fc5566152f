"""Convert checkpoints to ONNX, for ONNX Runtime, onnxruntime-genai and transformers.js."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from mka_export.models.activations import Activations
    from mka_export.models.checkpoint import Checkpoint
    from mka_export.models.outline import Outline
    from mka_export.needs import Need
    from mka_export.progress import Progress
    from mka_export.target import Artifact, Target

PACKAGES = ("onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-genai")


def check(checkpoint: Checkpoint, target: Target) -> None:
    """Say beforehand what the builder cannot express: see ``mka_onnx.checking.check``."""
    from mka_onnx.checking import check as run  # torch loads here, not with the package

    run(checkpoint, target)


def need(model: Outline, target: Target) -> Need:
    """Return what a conversion will take: see ``mka_onnx.size.need``."""
    from mka_onnx.size import need as run

    return run(model, target)


def bits_per_weight(model: Outline, target: Target) -> float | None:
    """Return the bits a weight of an artifact to be: see ``mka_onnx.size.bits_per_weight``."""
    from mka_onnx.size import bits_per_weight as run

    return run(model, target)


def unpacked_bytes(model: Outline, target: Target) -> int:
    """Return the most bytes that ``unpack`` writes: see ``mka_onnx.size.unpacked_bytes``."""
    from mka_onnx.size import unpacked_bytes as run

    return run(model, target)


def unpack(artifact: Path, target: Target, checkpoint: Checkpoint, out: Path, progress: Progress) -> None:
    """Write the weights of a quantized folder as a checkpoint: see ``mka_onnx.unpacking.unpack``."""
    from mka_onnx.unpacking import unpack as run

    run(artifact, target, checkpoint, out, progress)


def convert(
    checkpoint: Checkpoint,
    target: Target,
    out: Path,
    pieces: Path,
    *,
    activations: Activations | None,
    calibration: Tensor | None,
    progress: Progress,
) -> Artifact:
    """Turn a checkpoint into one folder inside ``out``: see ``mka_onnx.conversion.convert``."""
    from mka_onnx.conversion import convert as run

    return run(checkpoint, target, out, pieces, activations=activations, calibration=calibration, progress=progress)
