"""Convert checkpoints to GGUF, the format of llama.cpp."""

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

PACKAGES = ("gguf", "llama-cpp-python")


def check(checkpoint: Checkpoint, target: Target) -> None:
    """Say beforehand what GGUF or llama.cpp cannot express: see ``mka_gguf.conversion.check``."""
    from mka_gguf.conversion import check as run  # torch and llama.cpp load here, not with the package

    run(checkpoint, target)


def need(model: Outline, target: Target) -> Need:
    """Return what a conversion will take: see ``mka_gguf.size.need``."""
    from mka_gguf.size import need as run

    return run(model, target)


def bits_per_weight(model: Outline, target: Target) -> float | None:
    """Return the bits a weight of an artifact to be: see ``mka_gguf.mix.bits_per_weight``."""
    from mka_gguf.mix import bits_per_weight as run

    return run(model, target)


def unpacked_bytes(model: Outline, target: Target) -> int:
    """Return the most bytes that ``unpack`` writes: see ``mka_export.models.gguf_source.unpacked_bytes``."""
    from mka_export.models.gguf_source import unpacked_bytes as run

    return run(model, need(model, target).kept)


def unpack(artifact: Path, target: Target, checkpoint: Checkpoint, out: Path, progress: Progress) -> None:
    """Write the weights of a file as a checkpoint: see ``mka_export.models.gguf_source.gguf_to_checkpoint``."""
    from mka_export.models.gguf_source import gguf_to_checkpoint

    gguf_to_checkpoint(artifact, out, progress)


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
    """Turn a checkpoint into one GGUF file in the folder ``out``: see ``mka_gguf.conversion.convert``."""
    from mka_gguf.conversion import convert as run

    return run(checkpoint, target, out, pieces, activations=activations, calibration=calibration, progress=progress)
