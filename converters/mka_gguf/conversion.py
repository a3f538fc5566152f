"""Checkpoint to GGUF: write it unquantized, tensor by tensor, then let llama.cpp quantize it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray
from torch import Tensor
from transformers import PretrainedConfig

from mka_export.converting import conversion_errors
from mka_export.errors import ConversionError, MkaError, UnsupportedError
from mka_export.models.activations import Activations
from mka_export.models.checkpoint import Checkpoint
from mka_export.models.outline import Outline
from mka_export.progress import Progress
from mka_export.publish import publish_file, seal, sealed
from mka_export.target import Artifact, Target
from mka_gguf.hyperparameters import add_hyperparameters, add_rope, read_config, usable_context
from mka_gguf.quantizer import quantize
from mka_gguf.settings import read_settings
from mka_gguf.tensors import UNQUANTIZED, Entry, gguf_names, plan_tensors
from mka_gguf.vocabulary import Vocabulary, read_vocabulary
from mka_gguf.writing import Contents, add_general, add_imatrix, announce, read_contents, write

UNQUANTIZED_FILE = "unquantized.gguf"  # among the pieces


def check(checkpoint: Checkpoint, target: Target) -> None:
    """Check that the target's settings are known and that GGUF can say what the model's config and tokenizer say.

    Raises:
        ConversionError, UnsupportedError: as ``convert`` would.
    """
    read_settings(target)
    read_vocabulary(checkpoint.path, read_config(checkpoint), checkpoint.vocab_size)


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
    """Turn a checkpoint into one GGUF file, ``<name>-<PRECISION>.gguf``, in the existing empty folder ``out``.

    A quantized file is made from one in the checkpoint's own type, so that nothing is rounded twice.

    Args:
        checkpoint: the model; tensors are read one at a time.
        target: its ``precision`` is a name in ``settings.PRECISIONS``, its ``options`` those of ``settings.Options``.
        out: where to write.
        pieces: where the file that is quantized is kept, should the work be killed.
        activations: column statistics that guide the quantizer at 4 bits and fewer, or None.
        calibration: not used.
        progress: told what is going on.

    Returns:
        the artifact; ``details`` tells ``file_type``, tensor ``types``, ``fallback_types``, ``fallback_tensors``,
        ``fallback_share``, ``bits_per_weight``, ``imatrix_tensors``, ``vocabulary`` and ``warnings``.

    Raises:
        ConversionError: an option is wrong, the model is damaged, the disk is full, too much falls back.
        UnsupportedError: the model has something that GGUF or llama.cpp has no counterpart for.
    """
    with conversion_errors(out):
        return _convert(checkpoint, target, out, pieces, activations, progress)


def _convert(
    checkpoint: Checkpoint,
    target: Target,
    out: Path,
    pieces: Path,
    activations: Activations | None,
    progress: Progress,
) -> Artifact:
    precision, options = read_settings(target)
    config = read_config(checkpoint)
    vocabulary = read_vocabulary(checkpoint.path, config, checkpoint.vocab_size)
    guided = precision.imatrix if options.imatrix is None else options.imatrix
    imatrix = _imatrix(checkpoint, activations) if activations and guided and precision.quantized else {}

    matrix = _own_type(checkpoint) if precision.quantized else precision.matrix
    writer, entries = _prepare(checkpoint, config, vocabulary, matrix)
    add_general(writer, checkpoint, options.file_stem, precision, entries)
    if imatrix and activations:
        add_imatrix(writer, activations.calibration, len(imatrix))
    path = out / f"{options.file_stem or checkpoint.path.resolve().name}-{target.precision.upper()}.gguf"
    first = pieces / UNQUANTIZED_FILE if precision.quantized else path
    if sealed(first) is None:
        with progress.task(f"write {first.name}", len(entries)) as task, publish_file(first) as writing:
            write(writer, writing, entries, task)
    if precision.quantized:
        seal(first, {})
        with progress.task(f"quantize to {target.precision}", len(entries)) as task:
            try:
                quantize(first, path, precision.file_type, imatrix, task)
            except MkaError:
                first.unlink()
                raise

    contents = read_contents(path, precision)
    _check_fallback(target, contents, options.max_fallback)
    warnings = _warnings(config, vocabulary, contents)
    for warning in warnings:
        progress.say(f"  {path.name}: {warning}")
    return Artifact(
        path=path,
        files=(path.name,),
        nbytes=path.stat().st_size,
        details={
            "file_type": precision.file_type.name,
            "types": contents.types,
            "fallback_types": contents.fallbacks,
            "fallback_tensors": sum(contents.fallbacks.values()),
            "fallback_share": contents.fallback_share,
            "bits_per_weight": contents.bits_per_weight,
            "imatrix_tensors": len(imatrix),
            "vocabulary": {
                "model": vocabulary.model,
                "pre": vocabulary.pre,
                "tokens": len(vocabulary.tokens) - vocabulary.padding,
                "padding": vocabulary.padding,
            },
            "warnings": warnings,
        },
    )


def _prepare(
    checkpoint: Checkpoint, config: PretrainedConfig, vocabulary: Vocabulary, matrix: GGMLQuantizationType
) -> tuple[GGUFWriter, list[Entry]]:
    """Gather what goes into the file, without reading a tensor."""
    entries = plan_tensors(checkpoint, matrix, config.num_attention_heads, config.num_key_value_heads)
    writer = GGUFWriter(None, checkpoint.architecture.gguf_arch)
    add_hyperparameters(writer, config, checkpoint.vocab_size)
    factors = add_rope(writer, config, checkpoint)
    if factors is not None:
        shape = tuple(factors.shape)
        entries.insert(0, Entry("rope_freqs.weight", shape, GGMLQuantizationType.F32, "", lambda: factors))
    vocabulary.add_to(writer)
    announce(writer, entries)
    return writer, entries


def _warnings(config: PretrainedConfig, vocabulary: Vocabulary, contents: Contents) -> list[str]:
    warnings = list(vocabulary.warnings)
    context, announced = usable_context(config), config.max_position_embeddings
    if context < announced:
        warnings.append(f"context length {context} instead of {announced}: llama.cpp has no sliding window here")
    if contents.fallbacks:
        warnings.append(
            f"{contents.fallback_share:.0%} of the weights fell back to other types: {contents.fallback_text}"
        )
    return warnings


def _own_type(checkpoint: Checkpoint) -> GGMLQuantizationType:
    dtype = checkpoint.dtype
    if dtype not in UNQUANTIZED:
        raise UnsupportedError(f"{checkpoint.path} is stored as {dtype}", "Save it as float32, float16 or bfloat16.")
    return UNQUANTIZED[dtype]


def _imatrix(checkpoint: Checkpoint, activations: Activations) -> dict[str, NDArray[np.float32]]:
    """Return GGUF tensor name -> mean square of each input column, for the matrices that are written.

    Raises:
        ConversionError: the statistics are another model's, or hold NaN or infinity.
    """
    names = gguf_names(Outline.of_checkpoint(checkpoint))
    tied_head = checkpoint.architecture.tensors["head"]
    imatrix: dict[str, NDArray[np.float32]] = {}
    for name, mean_square in activations.mean_square.items():
        source = checkpoint.head if name == tied_head else name
        columns = checkpoint.shapes[source][-1] if source in names else None
        if columns != mean_square.numel():
            raise ConversionError(
                f"the activations have {mean_square.numel()} columns for {name}, the checkpoint {columns or 'no such matrix'}",
                "Compute the activations of this checkpoint again.",
            )
        values = mean_square.detach().cpu().float().contiguous().numpy()
        if not np.isfinite(values).all():
            raise ConversionError(f"the activations of {name} hold NaN or infinity", "Compute the activations again.")
        imatrix[names[source]] = values
    return imatrix


def _check_fallback(target: Target, contents: Contents, limit: float | None) -> None:
    if limit is not None and contents.fallback_share > limit:
        raise ConversionError(
            f"rows do not fit the blocks of {target.precision}: {contents.fallback_share:.0%} of the weights fell back"
            f" to other types ({contents.fallback_text}), more than max_fallback = {limit:.0%}",
            "Allow more, or choose q8_0 or q4_0, whose blocks are smaller.",
        )
