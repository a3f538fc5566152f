"""The rows of an MLP's gate and up matrices, fitted to what it should add: a Gauss–Newton step."""

from __future__ import annotations

import torch
from torch import Tensor

from mka_export.merge.fit_tokens import FIT_TOKENS, FitTokens
from mka_export.merge.fuse import FLOAT
from mka_export.merge.ridge import FLOOR, sum_of_squares

STEPS = 4  # of conjugate gradients
HOLD = 0.3  # how strongly the rows are held where they are; a tenth or ten times as much changes little


def rows_bytes(hidden: int, width: int) -> int:
    """Return the memory of ``adapt_rows`` and of what it is given: seven times all rows, the neurons of some tokens."""
    return FLOAT * (14 * hidden * width + 8 * FIT_TOKENS * width)


def adapt_rows(tokens: FitTokens, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Return gate and up rows with which the MLP comes closer to what it should add, or those given if it does not.

    ``down_proj`` stays as it is. Where each row changes a little, what the MLP adds changes by
    ``down ((act'(G x) ⊙ U x) ⊙ δG x + act(G x) ⊙ δU x)``. That is linear in δG and δU, and they are what a regression on what is still to be added finds in ``STEPS`` steps
    of conjugate gradients (Golub & Van Loan, Matrix Computations, §11.3), from the rows at hand and held there by
    ``HOLD`` × the diagonal of the normal equations, which are scaled by it too. The diagonal is taken to be the product of
    what a neuron does and what an input is, each in the mean.

    Args:
        tokens: what the MLP reads, and what it should add.
        gate, up: (neurons, hidden).
        down: (hidden, neurons).
    """
    rows = torch.cat([gate, up])
    slopes = tokens.scratch(len(rows))
    left, neurons, inputs = torch.zeros_like(rows), rows.new_zeros(len(rows)), rows.new_zeros(rows.shape[1])
    first, unexplained = 0, 0.0
    for read, targets, weight in tokens.blocks():
        activation, slope = torch.func.jvp(tokens.activation, (at := read @ gate.T,), (torch.ones_like(at),))[:2]
        linear = read @ up.T
        both = torch.cat([slope * linear, activation], dim=1) * weight
        slopes.write(first, both)
        residual = targets - (activation * linear * weight) @ down.T
        unexplained += sum_of_squares(residual)
        left += _by_rows(both, residual @ down, read)
        neurons += both.square().sum(dim=0)
        inputs += read.square().mean(dim=0)
        first += len(read)
    neurons = (neurons * down.square().sum(dim=0).repeat(2))[:, None]
    neurons, inputs = ((each + FLOOR * each.mean()) for each in (neurons, inputs / inputs.mean()))
    direction = left.div(neurons).div_(inputs)
    size = _dot(left, direction)
    for _ in range(STEPS):
        if not size > 0:  # nothing is left
            break
        image, first = direction.mul(HOLD * neurons).mul_(inputs), 0
        for read, _, _ in tokens.blocks():
            both = slopes.read(slice(first, first + len(read))).to(read.device)
            change = (both * (read @ direction.T)).view(len(read), 2, -1).sum(dim=1)
            image += _by_rows(both, (change @ down.T) @ down, read)
            first += len(read)
        length = size / _dot(direction, image)
        rows.add_(direction, alpha=length)
        left.sub_(image, alpha=length)
        scaled = torch.div(left, neurons, out=image).div_(inputs)
        before, size = size, _dot(left, scaled)
        direction.mul_(size / before).add_(scaled)
    tokens.free(slopes)
    adapted = rows[: len(gate)], rows[len(gate) :]
    # What is linear nearby need not be so far.
    return adapted if _unexplained(tokens, *adapted, down) < unexplained else (gate, up)


def _unexplained(tokens: FitTokens, gate: Tensor, up: Tensor, down: Tensor) -> float:
    """Return ‖what the MLP adds − what it should add‖² over all tokens."""
    return sum(sum_of_squares(neurons.matmul(down.T).sub_(targets)) for neurons, targets in tokens.neurons(gate, up))


def _by_rows(slopes: Tensor, neurons: Tensor, inputs: Tensor) -> Tensor:
    """Return the sum over tokens of what a change of each row does to ``neurons``: (2 · neurons, hidden)."""
    return (slopes * neurons.repeat(1, 2)).T @ inputs


def _dot(one: Tensor, other: Tensor) -> float:
    parts = zip(torch.split(one, FIT_TOKENS), torch.split(other, FIT_TOKENS), strict=True)  # little memory
    return float(sum((a * b).sum(dtype=torch.float64) for a, b in parts))
