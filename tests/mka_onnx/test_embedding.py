"""An embedding of its own in 8 bits, as ONNX Runtime looks it up."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from mka_onnx.eight_bits import ROWS
from mka_onnx.embedding import OWN, own_embedding, quantize_embedding
from onnx import TensorProto, helper, numpy_helper

IDS = np.array([[0, 3, ROWS + 1], [3, ROWS, 2]])


def model_with(table: np.ndarray) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "ids"], ["found"], name=OWN)],
        "lookup",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [2, 3])],
        [helper.make_tensor_value_info("found", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(table, "table")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def looked_up(model: onnx.ModelProto) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"ids": IDS})
    return np.asarray(found)


@pytest.fixture
def table() -> np.ndarray:
    values = np.random.default_rng(0).standard_normal((ROWS + 5, 64)).astype(np.float32)
    values[3, 32:] *= 1000  # two blocks of a row have each its own scale
    values[2] = 0
    return values


def test_every_weight_is_within_half_a_step(table):
    model = model_with(table)
    lookup = own_embedding(model.graph)
    assert lookup is not None
    quantize_embedding(model.graph, lookup, 32)
    assert {tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) == 3} == {TensorProto.UINT8}
    assert all(tensor.name != "table" for tensor in model.graph.initializer)
    steps = np.abs(table.reshape(-1, 2, 32)).max(axis=-1).repeat(32, axis=-1)[IDS] / 127
    off = np.abs(looked_up(model) - table[IDS])
    assert off.shape == (2, 3, 64)
    assert (off <= steps * 0.5001).all()
    assert off[steps > 0].max() > 0  # it is rounded
    assert (off[1, 2] == 0).all()


def test_rows_that_blocks_do_not_fill_stay_as_they_are(table):
    model = model_with(table)
    lookup = own_embedding(model.graph)
    assert lookup is not None
    quantize_embedding(model.graph, lookup, 48)
    np.testing.assert_array_equal(looked_up(model), table[IDS])


def test_a_lookup_that_is_not_the_embeddings_is_left_alone(table):
    model = model_with(table)
    model.graph.node[0].name = "/model/rotary/Gather"
    assert own_embedding(model.graph) is None
