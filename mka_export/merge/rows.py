"""The rows of an MLP's gate and up matrices, fitted to what it should add: a Gauss–Newton step."""

from __future__ import annotations

import torch
from torch import Tensor

from mka_export.merge.fit_tokens import FIT_TOKENS, FitTokens
from mka_export.merge.fuse import FLOAT
from mka_export.merge.ridge import FLOOR, sum_of_squares

STEPS = 2  # of conjugate gradients
HOLD = 0.3  # how strongly the rows are held where they are; a tenth or ten times as much changes little


def rows_bytes(hidden: int, width: int) -> int:
    """Return the memory of ``adapt_rows`` and of what it is given: five times all rows, the neurons of some tokens."""
    return FLOAT * (10 * hidden * width + 3 * hidden * hidden + 10 * FIT_TOKENS * width)


def adapt_rows(tokens: FitTokens, rows: Tensor, down: Tensor) -> None:
    """Change gate and up rows so that the MLP comes closer to what it should add; if it does not, they stay.

    ``down_proj`` stays as it is. Where each row changes a little, what the MLP adds changes by
    ``down ((act'(G x) ⊙ U x) ⊙ δG x + act(G x) ⊙ δU x)``. That is linear in δG and δU, and they are what a regression on
    what is still to be added finds in ``STEPS`` steps of conjugate gradients, from the rows at hand and held there by
    ``HOLD`` × the diagonal of the normal equations. These are preconditioned (Golub & Van Loan, Matrix Computations,
    §11.5) by the Kronecker product of what each neuron does and of what the inputs are together, in the mean (Martens &
    Grosse, arXiv 1503.05671, with the neurons' factor diagonal): the inputs are far from independent of each other.

    Args:
        tokens: what the MLP reads, and what it should add.
        rows: (2 · neurons, hidden), the gate's and below them those of up. Changed in place.
        down: (hidden, neurons).
    """
    given, slopes = tokens.scratch(rows.shape[1]), tokens.scratch(len(rows))
    given.write(0, rows)
    gate, up = rows.chunk(2)
    left, neurons, inputs = torch.zeros_like(rows), rows.new_zeros(len(rows)), rows.new_zeros(2 * rows.shape[1:])
    first, unexplained = 0, 0.0
    for read, targets, weight in tokens.blocks():
        activation, slope = torch.func.jvp(tokens.activation, (at := read @ gate.T,), (torch.ones_like(at),))[:2]
        linear = read @ up.T
        both = torch.cat([slope * linear, activation], dim=1) * weight
        slopes.write(first, both)
        residual = targets - (activation * linear * weight) @ down.T
        unexplained += sum_of_squares(residual)
        _add_by_rows(left, both, residual @ down, read)
        neurons += both.square().sum(dim=0)
        inputs.addmm_(read.T, read, alpha=1 / tokens.count)
        first += len(read)
    neurons = (neurons * down.square().sum(dim=0).repeat(2))[:, None]
    neurons += FLOOR * neurons.mean()
    held = HOLD * (inputs.diagonal() + FLOOR * inputs.diagonal().mean())
    factor = torch.linalg.cholesky(inputs + held.diag())
    direction, image, before = torch.zeros_like(left), torch.empty_like(left), 1.0
    for _ in range(STEPS):
        for part, shares, out in _some_rows(left, neurons, image):
            out.copy_(torch.cholesky_solve((part / shares).T, factor).T)
        size = _dot(left, image)
        if not size > 0:  # nothing is left
            break
        direction.mul_(size / before).add_(image)
        torch.mul(direction, neurons, out=image).mul_(held)
        first, before = 0, size
        for read, _, _ in tokens.blocks():
            both = slopes.read(slice(first, first + len(read))).to(read.device)
            change = (both * (read @ direction.T)).view(len(read), 2, -1).sum(dim=1)
            _add_by_rows(image, both, (change @ down.T) @ down, read)
            first += len(read)
        length = size / _dot(direction, image)
        rows.add_(direction, alpha=length)
        left.sub_(image, alpha=length)
    del left, direction, image
    if not _unexplained(tokens, gate, up, down) < unexplained:  # what is linear nearby need not be so far
        rows.copy_(given.read(slice(0, len(rows))))
    tokens.free(given, slopes)


def _unexplained(tokens: FitTokens, gate: Tensor, up: Tensor, down: Tensor) -> float:
    """Return ‖what the MLP adds − what it should add‖² over all tokens."""
    return sum(sum_of_squares(neurons.matmul(down.T).sub_(targets)) for neurons, targets in tokens.neurons(gate, up))


def _add_by_rows(sums: Tensor, slopes: Tensor, neurons: Tensor, inputs: Tensor) -> None:
    """Add to ``sums`` (2 · neurons, hidden), over some tokens, what a change of each row does to ``neurons``."""
    sums.addmm_((slopes * neurons.repeat(1, 2)).T, inputs)


def _some_rows(*matrices: Tensor) -> zip[tuple[Tensor, ...]]:
    """Go through all of them side by side, some rows at a time, which takes little memory."""
    return zip(*(torch.split(each, FIT_TOKENS) for each in matrices), strict=True)


def _dot(one: Tensor, other: Tensor) -> float:
    return float(sum((a * b).sum(dtype=torch.float64) for a, b in _some_rows(one, other)))
