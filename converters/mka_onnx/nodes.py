"""The builder's names of the matrices of a graph, and which of them have 8 bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mka_export.models.checkpoint import Checkpoint
from mka_onnx.settings import Options, Precision

HEAD = "/lm_head/MatMul"
QKV, OUT, GATE, UP, DOWN = "attn/qkv_proj", "attn/o_proj", "mlp/gate_proj", "mlp/up_proj", "mlp/down_proj"
MATRICES = {  # of a layer: a node, and the roles whose rows it has, one under the other
    QKV: ("q", "k", "v"),
    OUT: ("o",),
    GATE: ("gate",),
    UP: ("up",),
    DOWN: ("down",),
}


def node_name(layer: int, matrix: str) -> str:
    """Return the name of a layer's node, before it is quantized."""
    return f"/model/layers.{layer}/{matrix}/MatMul"


def sources(checkpoint: Checkpoint) -> Iterator[tuple[str, list[str]]]:
    """Yield each node, and the tensors whose rows its matrix has, one under the other."""
    yield HEAD, [checkpoint.head]
    architecture = checkpoint.architecture
    for layer in range(checkpoint.num_layers):
        for matrix, roles in MATRICES.items():
            yield node_name(layer, matrix), [architecture.layer_name(layer, architecture.layer[role]) for role in roles]


def builder_weights(precision: Precision, options: Options, layers: int, tied: bool) -> dict[str, Any]:
    """Return what the builder is to do with weights, in the words of its ``quant_config.weights``.

    Every quantized graph is one of 4 bits to the builder, with matrices of 8: only there does a tied embedding share the
    head's matrix. One of its own it leaves in float32, see ``mka_onnx.embedding``.
    """
    overrides = [{"match": {"name": node}, "type": "int8"} for node in eight_bits(precision, options, layers)]
    return {"overrides": overrides, "op_types": ["MatMul", "Gather"] if tied else ["MatMul"]}


def eight_bits(precision: Precision, options: Options, layers: int) -> list[str]:
    """Return the nodes that have 8 bits; what each is worth in a 4-bit graph is in docs/onnx.md."""
    if precision.bits == 8:
        return [HEAD, *(node_name(layer, matrix) for layer in range(layers) for matrix in MATRICES)]
    if options.mixed == "none":
        return []
    found = [HEAD]
    if options.mixed == "sensitive":
        found += [node_name(layer, QKV) for layer in range(layers)]
        ends = {*range(max(1, layers // 10)), *range(layers - max(2, layers // 6), layers)} & set(range(layers))
        found += [node_name(layer, matrix) for layer in sorted(ends) for matrix in (GATE, UP)]
        found += [node_name(layer, DOWN) for layer in range(layers) if layer in ends or _more_bits(layer, layers)]
    return found


def _more_bits(layer: int, layers: int) -> bool:
    """Whether llama.cpp's mixtures give a layer's ``down`` more bits: the first and last eighth, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
