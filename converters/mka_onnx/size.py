"""How large a folder will be, and what making it takes, before there is a checkpoint to convert."""

from __future__ import annotations

from math import prod

from mka_export.models.outline import Outline
from mka_export.needs import Need
from mka_export.target import Target
from mka_onnx.nodes import HEAD, MATRICES, eight_bits, node_name
from mka_onnx.settings import Options, Precision, read_settings

FLOAT = 4
TOKEN_BYTES = 128  # of tokenizer files for each token of a vocabulary
LAYER_BYTES = 16_384  # of the graph's nodes for each layer


def need(model: Outline, target: Target) -> Need:
    """Return what converting ``model`` takes; the size is an upper bound.

    The builder holds the whole model: as it is loaded, in float32, and in its own format.

    Raises:
        ConversionError: as ``convert``, of the target's settings.
    """
    precision, options = read_settings(target)
    values = sum(map(prod, model.shapes.values()))
    kept = LAYER_BYTES * (model.num_layers + 8) + TOKEN_BYTES * model.vocab_size
    kept += sum(int(_tensor_bytes(model, name, precision, options)) for name in model.shapes)
    head = model.architecture.tensors["head"]
    if head not in model.shapes and not precision.quantized:  # the graph has a transposed copy of what is tied
        kept += precision.bits // 8 * prod(model.shapes[model.architecture.tensors["embedding"]])
    return Need(kept=kept, memory=2 * FLOAT * values + kept)


def _tensor_bytes(model: Outline, name: str, precision: Precision, options: Options) -> float:
    shape = model.shapes[name]
    values = prod(shape)
    if len(shape) == 1 or not precision.quantized:
        return values * (FLOAT if precision.quantized else precision.bits / 8)
    tied = model.architecture.tensors["head"] not in model.shapes
    if not tied and name == model.architecture.tensors["embedding"]:
        return values * FLOAT
    bits = 8 if _node(model, name) in eight_bits(precision, options, model.num_layers) else 4
    scale = 8 * FLOAT + (0 if options.symmetric else bits)
    return values * (bits + scale / options.block_size) / 8


def _node(model: Outline, name: str) -> str:
    """Return the node whose matrix has the rows of a tensor; what is no layer's is the head's, or tied to it."""
    index, inside = model.architecture.split(name)
    if index is None:
        return HEAD
    roles = {tensor: role for role, tensor in model.architecture.layer.items()}
    return next(node_name(index, node) for node, given in MATRICES.items() if roles[inside] in given)
