"""How large a folder will be, and what making it takes, before there is a checkpoint to convert."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from mka_export.models.architecture import Architecture
from mka_export.models.outline import Outline
from mka_export.needs import Need
from mka_export.target import Target
from mka_onnx.building import require_builder
from mka_onnx.nodes import HEAD, MATRICES, eight_bits, node_name
from mka_onnx.scope import require_expressible
from mka_onnx.settings import Options, Precision, eight_bit_block, read_settings

FLOAT = 4
TOKEN_BYTES = 128  # of tokenizer files for each token of a vocabulary
LAYER_BYTES = 16_384  # of the graph's nodes for each layer


def need(model: Outline, target: Target) -> Need:
    """Return what converting ``model`` takes; the size is an upper bound.

    The builder holds the whole model: as it is loaded, in float32, and in its own format.

    Raises:
        ConversionError, UnsupportedError: as ``check``, as far as there is no checkpoint to look into.
    """
    precision, options = read_settings(target)
    require_builder()
    require_expressible(model, precision, options)
    values = sum(map(prod, model.shapes.values()))
    kept = LAYER_BYTES * (model.num_layers + 8) + TOKEN_BYTES * model.vocab_size
    kept += sum(int(prod(model.shapes[name]) * bits / 8) for name, bits in _bits(model, precision, options))
    if _tied(model) and not precision.quantized:  # the graph has a transposed copy of what is tied
        kept += precision.bits // 8 * prod(model.shapes[model.architecture.tensors["embedding"]])
    return Need(kept=kept, memory=2 * FLOAT * values + kept, cache=precision.itemsize * model.cache_values)


def bits_per_weight(model: Outline, target: Target) -> float | None:
    """Return the bits a weight of the quantized matrices of the artifact that would be made, scales and zero points included.

    More layers or fewer are another mixture: see ``nodes.eight_bits``.

    Returns:
        None where nothing is quantized.

    Raises:
        ConversionError: the target's settings are wrong.
    """
    precision, options = read_settings(target)
    if not precision.quantized:
        return None
    matrices = {name: prod(shape) for name, shape in model.shapes.items() if len(shape) > 1}
    spent = sum(matrices[name] * bits for name, bits in _bits(model, precision, options) if name in matrices)
    return spent / sum(matrices.values())


def unpacked_bytes(model: Outline, target: Target) -> int:
    """Return the most bytes that ``unpack`` writes: float32, and the tokenizer; nothing where nothing is quantized."""
    if not read_settings(target)[0].quantized:
        return 0
    return FLOAT * model.parameters + TOKEN_BYTES * model.vocab_size


def _bits(model: Outline, precision: Precision, options: Options) -> Iterator[tuple[str, float]]:
    """Yield each tensor, and the bits a weight that it takes in the graph; rows that fill their last block."""
    embedding = model.architecture.tensors["embedding"]
    eight, plain = set(eight_bits(precision, options, model.num_layers)), set() if _tied(model) else {embedding}
    wide = eight_bit_block(precision, options)
    for name, shape in model.shapes.items():
        if not precision.quantized:
            bits = float(precision.bits)
        elif len(shape) == 1 or (name in plain and shape[1] % wide):
            bits = 8 * FLOAT
        elif name in plain or (
            precision.bits == 4 and shape[1] % wide == 0 and _node(model.architecture, name) in eight
        ):
            bits = 8 + 8 * FLOAT / wide
        else:
            codes = 8 if _node(model.architecture, name) in eight else 4
            bits = codes + (8 * FLOAT + (0 if options.symmetric else codes)) / options.block_size
        yield name, bits


def _tied(model: Outline) -> bool:
    return model.architecture.tensors["head"] not in model.shapes


def _node(architecture: Architecture, name: str) -> str:
    """Return the node whose matrix has the rows of a tensor; what is no layer's is the head's, or tied to it."""
    index, inside = architecture.split(name)
    if index is None:
        return HEAD
    return next(
        node_name(index, node)
        for node, roles in MATRICES.items()
        if inside in (architecture.layer[role] for role in roles)
    )
