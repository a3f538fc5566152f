"""Which types llama.cpp's quantizer would give the tensors of a model that is not there."""

from __future__ import annotations

import os
import tempfile
from math import prod
from pathlib import Path

import gguf
import numpy as np
import transformers
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

from mka_export.models.outline import Outline
from mka_export.target import Target
from mka_gguf.hyperparameters import add_hyperparameters
from mka_gguf.quantizer import planned_types
from mka_gguf.settings import read_settings
from mka_gguf.tensors import gguf_names

ITEMSIZE = 2  # of the matrices that the file pretends to hold, in float16


def bits_per_weight(model: Outline, target: Target) -> float:
    """Return ``details["bits_per_weight"]`` of the artifact that would be made from ``model``.

    The mix depends on the number of layers and their places, so the library is asked, with a file whose data are a hole.

    Raises:
        ConversionError: the target's settings are wrong, or the library fails.
    """
    precision, options = read_settings(target)
    matrices = {name: shape for name, shape in model.shapes.items() if len(shape) > 1}
    types = dict.fromkeys(matrices, precision.matrix)
    if precision.quantized:
        names = gguf_names(model)
        guided = target.activations and (precision.imatrix if options.imatrix is None else options.imatrix)
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "hollow.gguf"
            _write_hollow(model, names, source)
            planned = planned_types(source, precision.file_type, guided=guided)
        types = {name: planned[names[name]] for name in matrices}
    return (
        8
        * sum(prod(shape) * _bytes_per_value(types[name]) for name, shape in matrices.items())
        / sum(map(prod, matrices.values()))
    )


def _write_hollow(model: Outline, names: dict[str, str], path: Path) -> None:
    """Write a file with the tensors of ``model``, whose data take no disk."""
    config = getattr(transformers, model.config["architectures"][0]).config_class.from_dict(dict(model.config))
    writer = GGUFWriter(path, model.architecture.gguf_arch)
    add_hyperparameters(writer, config, model.vocab_size)
    size = 0
    for name, shape in model.shapes.items():
        kind, itemsize = (GGMLQuantizationType.F16, ITEMSIZE) if len(shape) > 1 else (GGMLQuantizationType.F32, 4)
        nbytes = itemsize * prod(shape)
        # numpy's type is not looked at where the GGUF type is given
        writer.add_tensor_info(names[name], shape, np.dtype("float32"), nbytes, raw_dtype=kind)
        size += gguf.GGUFWriter.ggml_pad(nbytes, writer.data_alignment)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = gguf.GGUFWriter.ggml_pad(path.stat().st_size, writer.data_alignment)
    os.truncate(path, header + size)


def _bytes_per_value(kind: GGMLQuantizationType) -> float:
    block, nbytes = GGML_QUANT_SIZES[kind]
    return float(nbytes / block)
