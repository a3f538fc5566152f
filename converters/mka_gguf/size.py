"""How large a file will be, and what making it takes, before there is a checkpoint to convert."""

from __future__ import annotations

from math import prod

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from mka_export.models.outline import Outline
from mka_export.needs import Need
from mka_export.target import Target
from mka_gguf.quantizer import BUFFER_BYTES
from mka_gguf.settings import Precision, read_settings

TOKEN_BYTES = 64  # of metadata for each token of a vocabulary, with its merges
HEADER_BYTES = 1 << 20
CACHE_ITEMSIZE = 2  # llama.cpp keeps keys and values in float16
BETTER_TYPE = GGMLQuantizationType.Q6_K  # of the head, and of some matrices, in every mix below it
BETTER = ("v", "down", "o")  # the roles of those matrices
BETTER_SHARE = 0.6  # of them, at most: half of the layers, rounded up

# What llama.cpp takes where a row does not fit the block of a type.
FALLBACKS = {
    GGMLQuantizationType.Q3_K: GGMLQuantizationType.IQ4_NL,
    GGMLQuantizationType.Q4_K: GGMLQuantizationType.Q5_0,
    GGMLQuantizationType.Q5_K: GGMLQuantizationType.Q5_1,
    GGMLQuantizationType.Q6_K: GGMLQuantizationType.Q8_0,
    GGMLQuantizationType.IQ4_XS: GGMLQuantizationType.IQ4_NL,
}


def need(model: Outline, target: Target) -> Need:
    """Return what converting ``model`` takes; the file's size is an upper bound.

    Raises:
        ConversionError: as ``convert``, of the target's settings.
    """
    precision, _ = read_settings(target)
    size = HEADER_BYTES + TOKEN_BYTES * model.vocab_size
    size += sum(int(_tensor_bytes(model, name, precision)) for name in model.shapes)
    largest = max(map(prod, model.shapes.values()))
    own = max(model.itemsize, GGML_QUANT_SIZES[precision.matrix][1] if not precision.quantized else 0)
    memory = 3 * own * largest  # as it is stored, reordered, and in the file's type
    if precision.quantized:
        memory = max(memory, (4 + 1) * largest + BUFFER_BYTES)  # in float32, and its quantized rows
    scratch = model.nbytes + HEADER_BYTES if precision.quantized else 0
    return Need(kept=size, scratch=scratch, memory=memory, cache=CACHE_ITEMSIZE * model.cache_values)


def _tensor_bytes(model: Outline, name: str, precision: Precision) -> float:
    shape = model.shapes[name]
    values, row = prod(shape), shape[-1]
    if len(shape) == 1:
        return 4 * values
    tensors, (index, inside) = model.architecture.tensors, model.architecture.split(name)
    main = _bytes_per_value(precision.matrix, row)
    better = max(main, _bytes_per_value(BETTER_TYPE, row))
    if index is not None:
        share = BETTER_SHARE if model.architecture.roles[inside] in BETTER else 0.0
    else:
        head = tensors["head"] if tensors["head"] in model.shapes else tensors["embedding"]
        share = float(name == head)
    return values * ((1 - share) * main + share * better)


def _bytes_per_value(kind: GGMLQuantizationType, row: int) -> float:
    while row % GGML_QUANT_SIZES[kind][0]:
        kind = FALLBACKS.get(kind, GGMLQuantizationType.F16)
    block, nbytes = GGML_QUANT_SIZES[kind]
    return float(nbytes / block)
