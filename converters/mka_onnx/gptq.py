"""Rounding that looks at what a matrix is multiplied with: GPTQ (arXiv 2210.17323)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

DAMPING = 0.01  # of the Gram matrix' mean diagonal, added to it (the paper's)
SHRUNK = [1.0 - 0.04 * i for i in range(9)]  # of a block's range, what its grid may cover
HOLD = 0.05  # how strongly scales are held, relative to the energy of their blocks
FLOOR = 1e-12  # added to that: a block of zeros keeps its scale
EQUATIONS = 2**24  # coefficients of scales in memory at a time
COLUMNS = 32  # whose errors are carried over one by one; to the others together
ROWS = 4096  # that are dequantized at once


@dataclass(frozen=True)
class Blocks:
    """A matrix in blocks of columns that share a scale: (code − zero) · scale.

    Attributes:
        codes: (rows, columns) uint8.
        scales: (rows, blocks) float32.
        zeros: (rows, blocks) uint8.
        block: columns in each; the last may be shorter.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    block: int

    def dequantize(self) -> Tensor:
        """Return the matrix, float32."""
        columns = self.codes.shape[1]
        out = torch.empty(self.codes.shape)
        for part, codes, scales, zeros in zip(
            *(torch.split(each, ROWS) for each in (out, self.codes, self.scales, self.zeros)), strict=True
        ):
            torch.sub(codes.float(), _spread(zeros.float(), self.block, columns), out=part)
            part.mul_(_spread(scales, self.block, columns))
        return out


def quantize(weight: Tensor, gram: Tensor, bits: int, block: int, symmetric: bool) -> Blocks:
    """Round a matrix W so that Σ ‖(W − Ŵ) x‖² stays small, x the inputs that ``gram`` is of.

    Each column is rounded in turn, the heaviest input's first, and its error made up for by those still to come, as
    the inverse of the Gram matrix tells (algorithm 1 of the paper). The grids are chosen before, block by block: of a few
    that cover less than the block's range that of the smallest error, weighted by the inputs' mean squares.

    Args:
        weight: (rows, columns) float32.
        gram: mean of x xᵀ: (columns, columns).
        bits: of a code.
        block: columns that share a scale.
        symmetric: zeros are in the middle of the codes' range.
    """
    rows, columns = weight.shape
    importance = gram.diagonal().clone()
    scales, zeros = _grids(weight, importance, bits, block, symmetric)
    order = torch.argsort(importance, descending=True, stable=True)
    every_scale, every_zero = (_spread(each, block, columns).T[order].contiguous() for each in (scales, zeros))
    left = weight.T[order].contiguous()  # (columns, rows): what each column should still be
    codes = torch.empty_like(left)
    factor = _inverse_factor(gram[order][:, order])
    for start in range(0, columns, COLUMNS):
        stop = min(start + COLUMNS, columns)
        errors = torch.empty(stop - start, rows, device=weight.device)
        for column in range(start, stop):
            scale, zero = every_scale[column], every_zero[column]
            codes[column] = (left[column] / scale + zero).round_().clamp_(0, 2**bits - 1)
            error = (left[column] - (codes[column] - zero) * scale) / factor[column, column]
            left[column + 1 : stop] -= torch.outer(factor[column, column + 1 : stop], error)
            errors[column - start] = error
        left[stop:] -= factor[start:stop, stop:].T @ errors
    placed = torch.empty_like(codes)
    placed[order] = codes
    return Blocks(placed.T.contiguous().to(torch.uint8), scales, zeros.to(torch.uint8), block)


def fit_scales(blocks: Blocks, weight: Tensor, gram: Tensor) -> Blocks:
    """Return the same codes with the scales of the smallest Σ ‖(W − Ŵ) x‖², held near those at hand.

    They are as many unknowns for each row of W as it has blocks, in a least-squares problem of its own.

    Args:
        blocks: what W was rounded to.
        weight: W, (rows, columns) float32.
        gram: mean of x xᵀ: (columns, columns).
    """
    columns, block = weight.shape[1], blocks.block
    padding = -columns % block
    steps = torch.nn.functional.pad(blocks.codes.float() - _spread(blocks.zeros.float(), block, columns), (0, padding))
    right = torch.nn.functional.pad(weight @ gram, (0, padding))
    gram = torch.nn.functional.pad(gram, (0, padding, 0, padding))
    some = max(1, EQUATIONS // blocks.scales.shape[1] ** 2)
    found = [
        _least_squares(steps[part], right[part], blocks.scales[part], gram, block)
        for part in (slice(start, start + some) for start in range(0, len(weight), some))
    ]
    return replace(blocks, scales=torch.cat(found))


def _least_squares(steps: Tensor, right: Tensor, scales: Tensor, gram: Tensor, block: int) -> Tensor:
    """Return the scales (rows, blocks) of some rows, from their codes less the zeros and W G, both (rows, columns)."""
    parts = steps.view(len(steps), -1, block)
    pairs = zip(parts.unbind(1), torch.split(gram, block), strict=True)
    normal = torch.stack([(part @ rows).view_as(parts).mul_(parts).sum(dim=-1) for part, rows in pairs], dim=1)
    held = HOLD * normal.diagonal(dim1=1, dim2=2) + FLOOR
    normal += torch.diag_embed(held)
    products = (right.view_as(parts) * parts).sum(dim=-1) + held * scales
    found: Tensor = torch.linalg.solve(normal.double(), products.double())
    return found.float()


def _grids(weight: Tensor, importance: Tensor, bits: int, block: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return scales and zeros, (rows, blocks) float32."""
    rows, columns = weight.shape
    padding = -columns % block
    blocks = torch.nn.functional.pad(weight, (0, padding)).view(rows, -1, block)
    heavy = torch.nn.functional.pad(importance, (0, padding)).view(1, -1, block)
    scales, zeros = _grid(blocks, SHRUNK[0], bits, symmetric)
    best = torch.full_like(scales, torch.inf)
    for share in SHRUNK:
        scale, zero = _grid(blocks, share, bits, symmetric)
        wide, middle = scale[..., None], zero[..., None]
        codes = (blocks / wide + middle).round_().clamp_(0, 2**bits - 1)
        error = ((codes - middle) * wide - blocks).square_().mul_(heavy).sum(dim=-1)
        better = error < best
        best, scales, zeros = (
            torch.where(better, new, old) for new, old in ((error, best), (scale, scales), (zero, zeros))
        )
    return scales, zeros


def _grid(blocks: Tensor, share: float, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    top = 2**bits - 1
    if symmetric:  # the largest value, whatever its sign, is the lowest code: one more than there are above the middle
        extreme = blocks.gather(-1, blocks.abs().argmax(dim=-1, keepdim=True))[..., 0]
        scale = -share * extreme / 2 ** (bits - 1)
        zero = torch.full_like(scale, 2 ** (bits - 1))
    else:
        low, high = blocks.amin(dim=-1).clamp_max(0) * share, blocks.amax(dim=-1).clamp_min(0) * share
        scale = (high - low) / top
        zero = torch.where(scale == 0, 0, -low / scale).round_()
    return torch.where(scale == 0, 1.0, scale), zero


def _inverse_factor(gram: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the damped matrix' inverse."""
    damped = gram.double()  # massive activations make it hard on float32
    damped.diagonal().add_((DAMPING * damped.diagonal().mean()).clamp_min(1e-12))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


def _spread(each: Tensor, block: int, columns: int) -> Tensor:
    """Repeat a value of each block for all of its columns."""
    return each.repeat_interleave(block, dim=1)[:, :columns]
