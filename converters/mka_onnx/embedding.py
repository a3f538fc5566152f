"""The lookup of a quantized embedding, by operators that every build of ONNX Runtime has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onnx import GraphProto, NodeProto, TensorProto, helper

LOOKUP = "GatherBlockQuantized"
MIDDLE = 128  # where codes of 8 bits have no zero points


def plain_embedding(graph: GraphProto) -> None:
    """Replace a ``GatherBlockQuantized`` of 8 bits by standard operators that compute (code − zero) · scale.

    The builds of ONNX Runtime for the web that transformers.js loads have it for WebGPU only, not for the CPU. The codes are
    the head's: (vocabulary, blocks, block) uint8, as ``MatMulNBits`` has them.
    """
    producers = {output: node for node in graph.node for output in node.output}
    for place, node in enumerate(list(graph.node)):
        if node.op_type == LOOKUP and {a.name: a.i for a in node.attribute}["bits"] == 8:
            flat = producers[node.input[0]]  # a Reshape of the head's codes to (vocabulary, hidden)
            del graph.node[place]
            for step, new in enumerate(_lookup(graph, node, flat.input[0])):
                graph.node.insert(place + step, new)
            graph.node.remove(flat)
            return


def _lookup(graph: GraphProto, node: NodeProto, codes: str) -> list[NodeProto]:
    _, ids, scales, *zeros = node.input
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
