"""Checkpoint to ONNX: the builder makes the graph, and we make one folder of it for every client."""

from __future__ import annotations

from pathlib import Path

import psutil
from torch import Tensor

from mka_export.converting import conversion_errors
from mka_export.errors import ConversionError
from mka_export.hashes import files_in
from mka_export.models.activations import Activations
from mka_export.models.checkpoint import Checkpoint
from mka_export.models.outline import Outline
from mka_export.needs import size
from mka_export.progress import Progress
from mka_export.target import Artifact, Target
from mka_onnx.building import build
from mka_onnx.calibrated import fit_weights
from mka_onnx.checking import check
from mka_onnx.folder import finish
from mka_onnx.nbits import accuracy_level
from mka_onnx.nodes import builder_weights
from mka_onnx.settings import builder_options, eight_bit_block, fitted, read_settings
from mka_onnx.size import bits_per_weight, need


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
    """Turn a checkpoint into one folder, ``<name>-<precision>``, in the existing empty folder ``out``.

    Args:
        checkpoint: the model, which the builder loads as a whole.
        target: its ``precision`` is a name in ``settings.PRECISIONS``, its ``options`` those of ``settings.Options``.
        out: where to write.
        pieces: not used.
        activations: not used.
        calibration: token windows (N, T) that ``algorithm`` gptq fits weights of 4 bits to.
        progress: told what is going on.

    Returns:
        the artifact; ``details`` tells ``graph``, ``provider`` (whose operators it is made of), ``accuracy_level`` and
        ``bits_per_weight`` (of its quantized matrices, else None) and ``warnings``.

    Raises:
        ConversionError: an option is wrong, the model is damaged, the disk is full, the memory does not suffice.
        UnsupportedError: the builder does not know the model.
    """
    with conversion_errors(out):
        return _convert(checkpoint, target, out, calibration, progress)


def _convert(
    checkpoint: Checkpoint, target: Target, out: Path, calibration: Tensor | None, progress: Progress
) -> Artifact:
    check(checkpoint, target)
    precision, options = read_settings(target)
    wanted, free = need(Outline.of_checkpoint(checkpoint), target).memory, psutil.virtual_memory().available
    if wanted > free:
        raise ConversionError(
            f"the builder holds the whole model: about {size(wanted)} of memory, {size(free)} are free",
            "Close other programs, or convert on a larger machine.",
        )
    folder = out / f"{options.file_stem or checkpoint.path.resolve().name}-{target.precision}"
    (folder / precision.graph).parent.mkdir(parents=True)
    with progress.task(
        f"build the {target.precision} graph ({size(wanted)} of memory)", checkpoint.num_layers + 1
    ) as task:
        tied = checkpoint.head == checkpoint.architecture.tensors["embedding"]
        build(
            checkpoint.path,
            folder,
            "int4" if precision.quantized else target.precision,
            precision.provider,
            builder_options(precision, options),
            builder_weights(precision, options, checkpoint.num_layers, tied) if precision.quantized else None,
            task,
        )
    warnings = finish(folder, checkpoint, precision, eight_bit_block(precision, options))
    if fitted(precision, options):
        assert calibration is not None  # ``check`` looked whether the target asks for it
        fit_weights(folder / precision.graph, checkpoint, calibration, progress)
    for warning in warnings:
        progress.say(f"  {folder.name}: {warning}")
    files = files_in(folder)
    return Artifact(
        path=folder,
        files=tuple(f"{folder.name}/{name}" for name in files),
        nbytes=sum(path.stat().st_size for path in files.values()),
        details={
            "graph": precision.graph,
            "provider": precision.provider,
            "bits_per_weight": bits_per_weight(Outline.of_checkpoint(checkpoint), target),
            "accuracy_level": accuracy_level(folder / precision.graph),
            "warnings": warnings,
        },
    )
