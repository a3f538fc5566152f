"""The least squares of a merge, against the textbook's formula in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mka_export.errors import MkaError
from mka_export.merge import ridge as module
from mka_export.merge.ridge import FLOOR, Fit, Part, pull, ridge, ridge_in_parts

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
    penalty = torch.diag(pull(rows, len(squares)) * (squares + FLOOR * squares.mean()))
    expected = torch.linalg.solve(a64.T @ a64 + penalty, a64.T @ y64 + penalty @ prior64.T).T
    scale = a64.square().mean(dim=0).sqrt()
    torch.testing.assert_close(found.weights.double() * scale, expected * scale, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.root_mean_square.double(), scale, rtol=3e-3, atol=1e-3)
    left = (a64 @ expected.T - y64).square().sum() / y64.square().sum()
    assert found.unexplained == pytest.approx(float(left), rel=0.02, abs=1e-6)


@pytest.mark.parametrize("rows", [10, 500])
def test_parts_are_solved_as_one(rows, monkeypatch):
    monkeypatch.setattr(module, "_COLUMNS", 16)
    a, y, prior = problem(rows)
    whole, made = fitted(a, y, prior), []

    def part(columns: slice) -> Part:
        return Part(lambda: made.append(columns) or a[:, columns].clone(), prior[:, columns].clone)

    cut = [slice(0, 7), slice(7, 31), slice(31, FEATURES)]
    fits = [*ridge_in_parts([part(columns) for columns in cut], y.clone(), pull(rows, FEATURES))][::-1]
    for columns, fit in zip(cut, fits, strict=True):
        scale = whole.root_mean_square[columns]
        torch.testing.assert_close(fit.weights * scale, whole.weights[:, columns] * scale, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(fit.root_mean_square, scale, rtol=3e-3, atol=1e-3)
        assert fit.unexplained == pytest.approx(whole.unexplained, rel=0.02)
    assert made == [*cut, *cut[1::-1]]  # that of the last is still there


def test_few_rows_move_little():
    assert pull(1000, 100) == 0.1
    assert pull(50, 100) == 2.0
    assert pull(10**9, 100) == 0.01


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
