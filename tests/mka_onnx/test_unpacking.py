"""Weights read back: the folder's own, by what ONNX Runtime computes with them."""

from __future__ import annotations

from math import prod

import numpy as np
import onnx
import pytest
from exact import with_exact_activations
from mka_onnx import bits_per_weight, unpack, unpacked_bytes
from onnx_tools import target
from pico import make_pico

from mka_export.errors import CheckpointError, UnsupportedError
from mka_export.models.checkpoint import Checkpoint
from mka_export.models.outline import Outline
from mka_export.parity.runtimes.onnx_runtime import OnnxRuntime
from mka_export.parity.runtimes.torch_runtime import TorchRuntime
from mka_export.progress import Progress

IDS = np.random.default_rng(2).integers(3, 640, (2, 60))
WAYS = [
    ("pico_llama", "int4", {}),
    ("pico_llama", "int4", {"symmetric": True, "mixed": "head"}),
    ("pico_llama", "int4", {"mixed": "none"}),
    ("pico_qwen2", "int8", {}),
    ("pico_qwen2", "int4", {}),
]


@pytest.mark.parametrize(("model", "precision", "options"), WAYS)
def test_the_runtime_computes_with_the_weights_that_are_read_back(
    model, precision, options, request, convert_to, tmp_path
):
    folder = request.getfixturevalue(model)
    made, original, out = convert_to(folder, precision, **options).path, Checkpoint.open(folder), tmp_path / "out"
    out.mkdir()
    unpack(made, target(precision, **options), original, out, Progress(quiet=True))
    back = Checkpoint.open(out)
    assert back.shapes == original.shapes
    for name, shape in back.shapes.items():
        before, after = original.tensor(name).float(), back.tensor(name)
        if len(shape) == 1:
            assert after.equal(before)
        else:
            assert 0 < (after - before).norm() < 0.2 * before.norm()
    expected = np.stack(list(TorchRuntime(out).log_probs(IDS)))
    exact = np.stack(list(OnnxRuntime(with_exact_activations(made, tmp_path / "exact")).log_probs(IDS)))
    np.testing.assert_allclose(exact, expected, atol=1e-3)
    shipped = np.stack(list(OnnxRuntime(made).log_probs(IDS)))
    kl = (np.exp(expected) * (expected - shipped)).sum(axis=-1).mean()
    assert kl < 0.002  # it rounds what goes into a matrix to 8 bits
    assert (expected.argmax(-1) == shipped.argmax(-1)).mean() > 0.9
    assert sum(path.stat().st_size for path in out.iterdir()) <= unpacked_bytes(
        Outline.of_checkpoint(original), target(precision, **options)
    )


@pytest.mark.parametrize(("model", "precision", "options"), WAYS)
def test_the_bits_that_are_said_are_those_of_the_graph(model, precision, options, request, convert_to):
    folder = request.getfixturevalue(model)
    made, outline = convert_to(folder, precision, **options), Outline.of_checkpoint(Checkpoint.open(folder))
    graph = onnx.load(made.path / made.details["graph"], load_external_data=False).graph
    taken = {
        tensor.name: prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in graph.initializer
    }
    matrices = {name for node in graph.node if node.op_type == "MatMulNBits" for name in node.input[1:4] if name}
    matrices |= {node.input[0] for node in graph.node if "embed_tokens" in node.name and node.input[0] in taken}
    weights = sum(prod(shape) for shape in outline.shapes.values() if len(shape) > 1)
    said = made.details["bits_per_weight"]
    assert said == bits_per_weight(outline, target(precision, **options))
    assert said == pytest.approx(8 * sum(taken[name] for name in matrices) / weights)


def test_what_is_not_rounded_is_not_read_back(pico_llama, convert_to, tmp_path):
    made = convert_to(pico_llama, "fp32")
    with pytest.raises(UnsupportedError, match="pico-llama-fp32 are not quantized"):
        unpack(made.path, target("fp32"), Checkpoint.open(pico_llama), tmp_path, Progress(quiet=True))
    assert made.details["bits_per_weight"] is None


def test_a_folder_of_another_model_is_one_line(pico_llama, convert_to, tmp_path):
    other = make_pico(tmp_path / "other", "llama", intermediate_size=224)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"does not hold model.layers.0.mlp.gate_proj.weight"):
        unpack(
            convert_to(pico_llama, "int4").path,
            target("int4"),
            Checkpoint.open(other),
            tmp_path / "out",
            Progress(quiet=True),
        )
