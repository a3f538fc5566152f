"""The least squares of a merge, against the textbook's formula in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mka_export.errors import MkaError
from mka_export.merge import ridge as module
from mka_export.merge.ridge import FLOOR, RIDGE, Elimination, Fit, ridge

FEATURES, OUTPUTS = 40, 3


def problem(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    scales = torch.logspace(-1, 1, FEATURES)
    a = (torch.randn(rows, FEATURES, generator=generator) + 0.5) * scales
    truth = torch.randn(OUTPUTS, FEATURES, generator=generator) / scales
    y = a @ truth.T + 0.1 * torch.randn(rows, OUTPUTS, generator=generator)
    return a, y, truth + 0.3 * torch.randn(OUTPUTS, FEATURES, generator=generator) / scales


def fitted(a: Tensor, y: Tensor, prior: Tensor) -> Fit:
    def blocks() -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(a.clone().split(7), y.clone().split(7), strict=True)

    return ridge(blocks, len(a), prior)


@pytest.mark.parametrize("rows", [10, 39, 40, 41, 500])  # fewer than features, and more
def test_it_is_the_minimum(rows, monkeypatch):
    monkeypatch.setattr(module, "_COLUMNS", 16)
    a, y, prior = problem(rows)
    found = fitted(a, y, prior)
    a64, y64, prior64 = a.double(), y.double(), prior.double()
    squares = a64.square().sum(dim=0)
    penalty = torch.diag(RIDGE * (squares + FLOOR * squares.mean()))
    expected = torch.linalg.solve(a64.T @ a64 + penalty, a64.T @ y64 + penalty @ prior64.T).T
    scale = a64.square().mean(dim=0).sqrt()
    torch.testing.assert_close(found.weights.double() * scale, expected * scale, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.root_mean_square.double(), scale, rtol=3e-3, atol=1e-3)
    left = (a64 @ expected.T - y64).square().sum() / y64.square().sum()
    assert found.unexplained == pytest.approx(float(left), rel=0.02, abs=1e-6)


def test_it_stays_where_it_is_if_that_is_right():
    a, _, prior = problem(300)
    found = fitted(a, a @ prior.T, prior)
    torch.testing.assert_close(found.weights, prior, rtol=1e-5, atol=1e-6)
    assert found.unexplained < 1e-9


@pytest.mark.parametrize("rows", [10, 500])
def test_a_neuron_that_never_fires_keeps_its_output(rows):
    a, y, prior = problem(rows)
    a[:, 5] = 0
    found = fitted(a, y, prior)
    assert torch.isfinite(found.weights).all()
    torch.testing.assert_close(found.weights[:, 5], prior[:, 5])


@pytest.mark.parametrize("rows", [10, 500])
def test_nan_is_refused(rows):
    a, y, prior = problem(rows)
    a[3, 2] = float("nan")
    with pytest.raises(MkaError, match="NaN"):
        fitted(a, y, prior)


def objective(a: Tensor, y: Tensor, prior: Tensor, kept: list[int]) -> tuple[float, Tensor]:
    """The least of what ``Elimination`` minimises where only the features ``kept`` may be used, and where it lies."""
    a, y, prior = a.double(), y.double(), prior.double()
    squares = a.square().sum(dim=0)
    pull = RIDGE * (squares + FLOOR * squares.mean())
    gram = (a.T @ a + torch.diag(pull))[kept][:, kept]
    weights = torch.zeros_like(prior)
    weights[:, kept] = torch.linalg.solve(gram, (a.T @ y + pull[:, None] * prior.T)[kept]).T
    value = (a @ weights.T - y).square().sum() + (pull * (weights - prior).square()).sum()
    return float(value), weights


@pytest.mark.parametrize("keep", [9, 6, 3, 1])
def test_elimination_drops_what_costs_least_one_after_another(keep):
    a, y, prior = problem(300)
    regression = Elimination(prior, 10)
    for rows, targets in zip(a.split(50), y.split(50), strict=True):
        regression.add(rows, targets)
    kept, fit = regression.keep(keep)
    left = list(range(10))
    while len(left) > keep:  # by trying all

        def cost(group: int) -> float:
            return objective(a, y, prior, [4 * g + i for g in left if g != group for i in range(4)])[0]

        left.remove(min(left, key=cost))
    assert kept.tolist() == left
    features = [4 * g + i for g in left for i in range(4)]
    _, expected = objective(a, y, prior, features)
    scale = a.square().mean(dim=0).sqrt()[features]
    torch.testing.assert_close(fit.weights * scale, expected[:, features].float() * scale, rtol=1e-3, atol=1e-3)
    unexplained = (a.double() @ expected.T - y).square().sum() / y.double().square().sum()
    assert fit.unexplained == pytest.approx(float(unexplained), rel=1e-3)


def test_elimination_meets_nan():
    a, y, prior = problem(50)
    regression = Elimination(prior, 10)
    regression.add(a, y)
    regression.add(a * float("nan"), y)
    with pytest.raises(MkaError, match="NaN or infinity"):
        regression.keep(5)
