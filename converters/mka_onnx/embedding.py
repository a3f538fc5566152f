"""The lookup of an embedding of 8 bits, by operators that every build of ONNX Runtime has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from mka_export.errors import CheckpointError
from mka_onnx.eight_bits import MIDDLE, round_to_8_bits

LOOKUP = "GatherBlockQuantized"
OWN = "/model/embed_tokens/Gather"  # the builder's name of the lookup where the head has another matrix


def plain_embedding(graph: GraphProto) -> None:
    """Replace a ``GatherBlockQuantized`` of 8 bits by standard operators that compute (code − zero) · scale.

    The builds of ONNX Runtime for the web that transformers.js loads have it for WebGPU only, not for the CPU. The codes are
    the head's: (vocabulary, blocks, block) uint8, as ``MatMulNBits`` has them.
    """
    producers = {output: node for node in graph.node for output in node.output}
    for place, node in enumerate(list(graph.node)):
        if node.op_type == LOOKUP and {a.name: a.i for a in node.attribute}["bits"] == 8:
            flat = producers[node.input[0]]  # a Reshape of the head's codes to (vocabulary, hidden)
            _, ids, *grid = node.input
            _replace(graph, place, _lookup(graph, node, [flat.input[0], ids, *grid]))
            graph.node.remove(flat)
            shape = producers[flat.input[1]]  # a Constant
            if not any(shape.output[0] in other.input for other in graph.node):
                graph.node.remove(shape)
            return


def own_embedding(graph: GraphProto) -> NodeProto | None:
    """Return the lookup of a float32 embedding; None where the graph has none."""
    return next((node for node in graph.node if node.name == OWN and node.op_type == "Gather"), None)


def quantize_embedding(graph: GraphProto, lookup: NodeProto, block: int) -> None:
    """Round the embedding of a lookup to the nearest of 8 bits, ``block`` weights of a row with one scale.

    The builder leaves one that is not the head's in float32. Rows whose length is no multiple of ``block`` stay so.

    Args:
        graph: with the embedding's values in it.
        lookup: what ``own_embedding`` found.
    """
    table = next(tensor for tensor in graph.initializer if tensor.name == lookup.input[0])
    values = numpy_helper.to_array(table)
    if values.shape[1] % block:
        return
    codes, scales = round_to_8_bits(values, block)
    graph.initializer.remove(table)
    names = [f"{table.name}_{part}" for part in ("codes", "scales")]
    graph.initializer.extend([numpy_helper.from_array(codes, names[0]), numpy_helper.from_array(scales, names[1])])
    place = next(i for i, node in enumerate(graph.node) if node.name == lookup.name)
    _replace(graph, place, _lookup(graph, lookup, [names[0], lookup.input[1], names[1]]))


def own_rows(graph: GraphProto, folder: Path) -> NDArray[np.float32]:
    """Return the embedding that is not the head's, (vocabulary, hidden), as it is in a finished graph.

    Raises:
        CheckpointError: the graph has none that we made.
    """
    tables = {tensor.name: tensor for tensor in graph.initializer}
    found = [
        numpy_helper.to_array(tables[node.input[0]], str(folder))
        for node in graph.node
        if node.op_type == "Gather" and node.name.startswith(OWN) and node.input[0] in tables
    ]
    codes = [table for table in found if table.dtype == np.uint8]
    others = [table for table in found if table.dtype == np.float32]
    if len(others) != 1 or len(codes) > 1:
        raise CheckpointError(f"the graph in {folder} has an unknown embedding", "Make the folder anew.")
    if not codes:
        return others[0]
    rows: NDArray[np.float32] = codes[0].astype(np.float32)
    rows -= np.float32(MIDDLE)
    rows *= others[0][..., None]
    return rows.reshape(len(rows), -1)


def _replace(graph: GraphProto, place: int, nodes: Sequence[NodeProto]) -> None:
    del graph.node[place]
    for step, new in enumerate(nodes):
        graph.node.insert(place + step, new)


def _lookup(graph: GraphProto, node: NodeProto, inputs: Sequence[str]) -> list[NodeProto]:
    """Return what stands for ``node``; its inputs are codes, token ids, scales, and zero points where there are any."""
    codes, ids, scales, *zeros = inputs
    made: list[NodeProto] = []

    def add(kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        name = f"{node.name}/{kind}_{len(made)}"
        made.append(helper.make_node(kind, inputs, [f"{name}/output_0"], name=name, **attributes))
        return f"{name}/output_0"

    def constant(name: str, data_type: int, values: Sequence[float]) -> str:
        tensor = helper.make_tensor(f"{node.name}/{name}", data_type, [len(values)], values)
        graph.initializer.append(tensor)
        return str(tensor.name)

    last = constant("last", TensorProto.INT64, [-1])
    rows = add("Cast", [add("Gather", [codes, ids])], to=TensorProto.FLOAT)
    if zeros and zeros[0]:
        zero = add("Cast", [add("Unsqueeze", [add("Gather", [zeros[0], ids]), last])], to=TensorProto.FLOAT)
    else:
        zero = constant("middle", TensorProto.FLOAT, [MIDDLE])
    scale = add("Unsqueeze", [add("Gather", [scales, ids]), last])
    values = add("Mul", [add("Sub", [rows, zero]), scale])
    add("Reshape", [values, constant("shape", TensorProto.INT64, [0, 0, -1])])
    made[-1].output[0] = node.output[0]
    return made
