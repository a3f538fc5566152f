"""Rounding against its definition, and what is written against what ONNX Runtime computes."""

from __future__ import annotations

import onnx
import pytest
import torch
from mka_onnx.gptq import DAMPING, HOLD, Blocks, fit_scales, quantize
from mka_onnx.nbits import quantized_matrices

from mka_export.models.onnx_file import read_graph

RANDOM = torch.Generator().manual_seed(3)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=RANDOM)


def gram_of(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.T @ inputs / len(inputs)


def nearest(weight: torch.Tensor, blocks: Blocks, bits: int) -> torch.Tensor:
    """Round every weight to the nearest code of its block's grid."""
    scales, zeros = (
        each.repeat_interleave(blocks.block, 1)[:, : weight.shape[1]] for each in (blocks.scales, blocks.zeros)
    )
    return (weight / scales + zeros).round().clamp(0, 2**bits - 1)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_independent_inputs_leave_nothing_to_make_up_for(bits, symmetric):
    weight, gram = normal(24, 80), torch.diag(torch.rand(80, generator=RANDOM) + 0.1)
    blocks = quantize(weight, gram, bits, 32, symmetric)
    torch.testing.assert_close(blocks.codes.float(), nearest(weight, blocks, bits))
    assert blocks.scales.shape == (24, 3)
    if symmetric:
        assert (blocks.zeros == 2 ** (bits - 1)).all()
    step = blocks.scales.abs().repeat_interleave(32, 1)[:, :80]
    assert ((blocks.dequantize() - weight).abs() <= 0.51 * step).float().mean() > 0.9  # the others are clipped


def one_by_one(weight: torch.Tensor, gram: torch.Tensor, blocks: Blocks, bits: int) -> torch.Tensor:
    """Optimal brain quantization in a fixed order, by its definition: after each column the inverse without it."""
    hessian = gram.double() + DAMPING * gram.diagonal().mean().double() * torch.eye(len(gram), dtype=torch.float64)
    left, codes = weight.double().clone(), torch.zeros_like(weight)
    order = torch.argsort(gram.diagonal(), descending=True, stable=True).tolist()
    for done, column in enumerate(order):
        rest = order[done:]
        inverse = torch.linalg.inv(hessian[rest][:, rest])
        codes[:, column] = nearest(left.float(), blocks, bits)[:, column]
        scale, zero = (each[:, column // blocks.block] for each in (blocks.scales, blocks.zeros))
        error = left[:, column] - ((codes[:, column] - zero) * scale).double()
        left[:, rest] -= torch.outer(error, inverse[0]) / inverse[0, 0]
    return codes


def test_it_is_optimal_brain_quantization_in_order_of_the_inputs_weight():
    inputs = normal(300, 70) @ (torch.eye(70) + 0.4 * normal(70, 70)) * torch.linspace(0.2, 3, 70)
    weight, gram = normal(16, 70), gram_of(inputs)
    blocks = quantize(weight, gram, 4, 32, False)
    same = (blocks.codes.float() == one_by_one(weight, gram, blocks, 4)).float().mean()
    assert same > 0.99  # a value in the middle between two codes falls to either side


def test_it_loses_less_than_rounding_to_the_nearest():
    inputs = normal(2000, 128) @ (torch.eye(128) + 0.3 * normal(128, 128))
    weight = normal(64, 128)
    blocks = quantize(weight, gram_of(inputs), 4, 32, False)
    plain = Blocks(nearest(weight, blocks, 4).to(torch.uint8), blocks.scales, blocks.zeros, 32)
    lost, lost_plain = (((b.dequantize() - weight) @ inputs.T).square().sum() for b in (blocks, plain))
    assert lost < 0.6 * lost_plain


@pytest.mark.parametrize("symmetric", [False, True])
def test_fitted_scales_are_those_of_least_squares(symmetric):
    inputs = normal(2000, 80) @ (torch.eye(80) + 0.3 * normal(80, 80))
    weight = normal(64, 80)
    rounded = quantize(weight, gram_of(inputs), 4, 32, symmetric)
    fitted = fit_scales(rounded, weight, gram_of(inputs))
    assert torch.equal(fitted.codes, rounded.codes)
    lost, before = (((b.dequantize() - weight) @ inputs.T).square().sum() for b in (fitted, rounded))
    assert lost < before

    steps = (rounded.codes.double() - rounded.zeros.double().repeat_interleave(32, 1)[:, :80])[5]
    blocks = torch.stack([inputs[:, i : i + 32].double() @ steps[i : i + 32] for i in (0, 32, 64)], dim=1)
    held = (HOLD * blocks.square().sum(dim=0)).sqrt()
    target = torch.cat([inputs.double() @ weight[5].double(), held * rounded.scales[5].double()])
    expected = torch.linalg.lstsq(torch.cat([blocks, held.diag()]), target[:, None]).solution[:, 0]
    torch.testing.assert_close(fitted.scales[5], expected.float(), rtol=1e-3, atol=1e-4)


def test_inputs_that_are_always_zero_do_no_harm():
    inputs = normal(100, 64)
    inputs[:, 5] = 0
    weight = normal(8, 64)
    weight[3] = 0
    gram = gram_of(inputs)
    blocks = fit_scales(quantize(weight, gram, 4, 32, False), weight, gram)
    assert blocks.dequantize().isfinite().all()
    assert (blocks.dequantize()[3] == 0).all()


def test_what_is_written_is_read(pico_llama, convert_to, tmp_path):
    made = convert_to(pico_llama, "int4").path / "onnx"
    for name in ("model_q4.onnx", "model_q4.onnx_data"):
        (tmp_path / name).write_bytes((made / name).read_bytes())
    model = read_graph(tmp_path / "model_q4.onnx")
    for matrix in quantized_matrices(model, tmp_path).values():
        blocks = matrix.read()
        changed = Blocks(
            torch.randint_like(blocks.codes, 2**matrix.bits),
            blocks.scales * 2,
            blocks.zeros if matrix.symmetric else torch.randint_like(blocks.zeros, 2**matrix.bits),
            blocks.block,
        )
        matrix.write(changed)
        again = matrix.read()
        assert torch.equal(again.codes, changed.codes)
        assert torch.equal(again.scales, changed.scales)
        assert torch.equal(again.zeros, changed.zeros)
    onnx.save(model, tmp_path / "model_q4.onnx")
    onnx.load(tmp_path / "model_q4.onnx")
