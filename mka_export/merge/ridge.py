"""Least squares Y ≈ A Wᵀ with a pull towards weights that are known already, from rows that are streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mka_export.models.finite import MakesNaN

LEAST_PULL = 0.01  # keeps float32 sound
FLOOR = 1e-6  # of the features' mean square, added to each one's: one that is always 0 keeps its weight
Blocks = Callable[[], Iterator[tuple[Tensor, Tensor]]]  # of A (n, features) and Y (n, outputs), float32

_COLUMNS = 2048  # of a Gram matrix that are made at a time: only what lies below its diagonal is needed


@dataclass(frozen=True)
class Part:
    """Some of the features of a regression.

    Attributes:
        features: returns A's columns: (rows, features) float32, which are overwritten.
        prior: returns the known weights of these: (outputs, features).
    """

    features: Callable[[], Tensor]
    prior: Callable[[], Tensor]


@dataclass(frozen=True)
class Fit:
    """What a regression found.

    Attributes:
        weights: W (outputs, features), float32.
        root_mean_square: of each feature over the rows: (features,).
        unexplained: ‖A Wᵀ − Y‖² / ‖Y‖², the share of the targets' energy that is left.
    """

    weights: Tensor
    root_mean_square: Tensor
    unexplained: float


def ridge(blocks: Blocks, rows: int, prior: Tensor, strength: float | None = None) -> Fit:
    """Return the W that minimises ‖A Wᵀ − Y‖² + Σ_j λ_j ‖w_j − prior_j‖² with λ_j = strength × (AᵀA)_jj.

    So what is held back is the change of each feature's contribution, whatever the feature's own scale.
    The problem is solved in as many unknowns as there are rows or features, whichever is fewer: memory for two
    matrices of that size, and for all of A where the rows are fewer, in float32. (Features scaled to the same
    length have a Gram matrix whose eigenvalues, with the strength added, lie so close together that float32 will do.)

    Args:
        blocks: the rows of A and Y.
        rows: how many there are.
        prior: the known weights, (outputs, features).
        strength: of the pull towards them; by default ``pull``.

    Raises:
        MakesNaN: the rows hold NaN or infinity.
    """
    features = prior.shape[1]
    solve = _in_rows if rows < features else _in_features
    return solve(blocks, rows, prior, pull(rows, features) if strength is None else strength)


def pull(rows: int, features: int) -> float:
    """Return how strongly known weights should hold: the fewer rows there are for each feature, the more.

    Generalised cross-validation (Golub, Heath & Wahba 1979) chooses about as much; see docs/method.md.
    """
    return max(LEAST_PULL, features / rows)


def ridge_values(rows: int, features: int, outputs: int) -> int:
    """How many numbers ``ridge`` holds at most: a Gram matrix and its factor, the change of the weights, A if it must."""
    if rows < features:
        return rows * (features + 2 * outputs) + max(2 * rows * rows, outputs * features)
    return features * (2 * features + 3 * outputs)


def _in_features(blocks: Blocks, rows: int, prior: Tensor, strength: float) -> Fit:
    """(D⁻¹AᵀAD⁻¹ + strength) D(W − prior)ᵀ = D⁻¹Aᵀ(Y − A priorᵀ), D² the diagonal of AᵀA."""
    outputs, features = prior.shape
    gram = torch.zeros(features, features, device=prior.device)
    cross = torch.zeros(features, outputs, device=prior.device)
    energy = before = 0.0
    for a, y in blocks():
        residual = y - a @ prior.T
        for start in range(0, features, _COLUMNS):
            part = slice(start, start + _COLUMNS)
            gram[start:, part].addmm_(a[:, start:].T, a[:, part])
        cross.addmm_(a.T, residual)
        energy += sum_of_squares(y)
        before += sum_of_squares(residual)
    scale = _scale(gram.diagonal().clone())
    gram.mul_(1 / scale).mul_(1 / scale[:, None])
    gram.diagonal().add_(strength)
    cross.mul_(1 / scale[:, None])
    factor = _factor(gram, cross)
    del gram  # solving copies the factor
    change = torch.cholesky_solve(cross, factor)
    # ‖A Δᵀ − residual‖² by the equations that Δ solves.
    left = before - float((change * cross).sum(dtype=torch.float64)) - strength * sum_of_squares(change)
    change /= scale[:, None]
    return Fit(change.add_(prior.T).T, scale / rows**0.5, max(0.0, left / energy))


def _in_rows(blocks: Blocks, rows: int, prior: Tensor, strength: float) -> Fit:
    a, y, first = prior.new_empty(rows, prior.shape[1]), prior.new_empty(rows, len(prior)), 0
    for neurons, targets in blocks():
        part = slice(first, first + len(targets))
        a[part], y[part] = neurons, targets
        first = part.stop
    return next(ridge_in_parts([Part(lambda: a, lambda: prior)], y, strength))


def ridge_in_parts(parts: Sequence[Part], targets: Tensor, strength: float) -> Iterator[Fit]:
    """Yield what ``ridge`` finds for the features of each part, **the last part first**, where features outnumber the rows.

    Δᵀ = D⁻²Aᵀ Z / strength with (A D⁻² Aᵀ / strength + 1) Z = Y − A priorᵀ; what is left of the residual is Z. A sum over
    the features is one over the parts, of which one is in memory at a time.

    Args:
        targets: Y (rows, outputs), overwritten.
        strength: of the pull towards the known weights.

    Raises:
        MakesNaN: the rows hold NaN or infinity.
    """
    energy, kernel = sum_of_squares(targets), targets.new_zeros(len(targets), len(targets))
    scales, a = [], None
    for part in parts:
        del a  # before the next is made
        a, prior = part.features(), part.prior()
        targets.sub_(a @ prior.T)
        scales.append(_scale(torch.linalg.vector_norm(a, dim=0).square_()))
        a /= scales[-1] * strength**0.5
        for start in range(0, len(a), _COLUMNS):
            kernel[start:, start : start + _COLUMNS].addmm_(a[start:], a[start : start + _COLUMNS].T)
    kernel.diagonal().add_(1.0)
    factor = _factor(kernel, targets)
    del kernel
    left = torch.cholesky_solve(targets, factor)
    del factor
    unexplained = sum_of_squares(left) / energy
    for number in reversed(range(len(parts))):
        if a is None:
            a = parts[number].features()
            a /= scales[number] * strength**0.5
        change = a.T @ left
        a = None
        change /= scales[number][:, None] * strength**0.5
        weights = change.add_(parts[number].prior().T).T
        yield Fit(weights, scales[number] / len(targets) ** 0.5, unexplained)


def _scale(squares: Tensor) -> Tensor:
    """The length of each column, kept off zero: (features,)."""
    return (squares + FLOOR * squares.mean()).sqrt()


def sum_of_squares(values: Tensor) -> float:
    """Return what the squares add up to, added in float64."""
    return float(values.square().sum(dtype=torch.float64))


def _factor(matrix: Tensor, right: Tensor) -> Tensor:
    """Return the Cholesky factor of a positive definite matrix, of which the lower triangle is read.

    Raises:
        MakesNaN: it is none, or what is to be solved for holds NaN or infinity.
    """
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed) != 0 or not bool(torch.isfinite(right).all()):
        raise MakesNaN("a least-squares fit met NaN or infinity", "The model is damaged or needs another precision.")
    return factor
