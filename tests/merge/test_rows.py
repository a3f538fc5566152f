"""Rows adapted to what an MLP should add, against the textbook's regression in float64."""

from __future__ import annotations

import pytest
import torch
from merge_tools import WINDOWS
from torch import Tensor

from mka_export.merge import compete as competition
from mka_export.merge import rows as module
from mka_export.merge.compete import ROUNDS, compete
from mka_export.merge.fit_tokens import FitTokens, normed
from mka_export.merge.rows import HOLD, adapt_rows
from mka_export.merge.steps import Choice
from mka_export.merge.trajectory import Trajectory
from mka_export.models.checkpoint import Checkpoint
from mka_export.models.runner import LayerRunner

NEURONS = 6  # of the pico model's: the textbook's regression has a column for each number


@pytest.fixture
def trajectory(pico_llama, tmp_path) -> Trajectory:
    return Trajectory(LayerRunner(Checkpoint.open(pico_llama)), torch.from_numpy(WINDOWS), tmp_path / "states")


@pytest.fixture
def mlp(trajectory) -> tuple[FitTokens, Tensor, Tensor]:
    """A small part of an MLP that is to add what it and the next layer add."""
    rows = torch.cat([normed(trajectory.runner, 2, f"mlp.{name}_proj.weight")[:NEURONS] for name in ("gate", "up")])
    down = trajectory.weights(2, "mlp.down_proj.weight")["mlp.down_proj.weight"][:, :NEURONS]
    return FitTokens(trajectory, Choice(2, 3), relative=True), rows, down


def added(tokens: FitTokens, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """What the MLP adds for all tokens, and what it should add: float64."""
    gate, up, down = (each.double() for each in (gate, up, down))
    read, targets, weight = (torch.cat(each).double() for each in zip(*tokens.blocks(), strict=True))
    return weight * ((torch.nn.functional.silu(read @ gate.T) * (read @ up.T)) @ down.T), targets


def test_many_steps_find_what_the_regression_finds(mlp, monkeypatch):
    tokens, rows, down = mlp
    gate, up = rows.chunk(2)
    before, targets = added(tokens, gate, up, down)
    jacobian = torch.cat(
        [
            each.flatten(start_dim=2).flatten(end_dim=1)
            for each in torch.func.jacfwd(lambda *rows: added(tokens, *rows, down)[0], argnums=(0, 1))(gate, up)
        ],
        dim=1,
    ).double()
    # The diagonal of the normal equations, as the docstring takes it.
    read, _, weight = (torch.cat(each).double() for each in zip(*tokens.blocks(), strict=True))
    at, linear = read @ gate.double().T, read @ up.double().T
    share = torch.sigmoid(at)
    slopes = torch.cat([share * (1 + at * (1 - share)) * linear, at * share], dim=1) * weight
    neurons = slopes.square().sum(dim=0) * down.double().square().sum(dim=0).repeat(2)
    inputs = read.square().mean(dim=0)
    held = HOLD * torch.outer(neurons, inputs).flatten()
    expected = torch.linalg.solve(
        jacobian.T @ jacobian + torch.diag(held), jacobian.T @ (targets - before).flatten()
    ).view(2, NEURONS, -1)
    monkeypatch.setattr(module, "STEPS", 80)
    monkeypatch.setattr(module, "_unexplained", lambda *_: 0.0)  # these few neurons are far from it: see below
    adapted = rows.clone()
    adapt_rows(tokens, adapted, down)
    found = (adapted - rows).double().view(2, NEURONS, -1)
    assert float((found - expected).norm() / expected.norm()) < 1e-3


def test_rows_that_cannot_be_better_stay(mlp):
    tokens, rows, down = mlp
    adapted = rows.clone()
    adapt_rows(tokens, adapted, torch.zeros_like(down))
    assert torch.equal(adapted, rows)


def test_a_merge_explains_more_with_adapted_rows_where_tokens_are_enough(trajectory, monkeypatch):
    monkeypatch.setattr(competition, "ROW_TOKENS", WINDOWS.size / trajectory.runner.checkpoint.hidden_size)
    kept, adapted = (compete(trajectory, Choice(2, 3), rounds=rounds)[1] for rounds in (0, ROUNDS))
    assert adapted["unexplained"] < 0.95 * kept["unexplained"]
    assert adapted["neurons_from_lowest"] == kept["neurons_from_lowest"]
    assert not list(trajectory.folder.glob("fit-*")), "nothing of a fit stays on disk"
    monkeypatch.setattr(competition, "ROW_TOKENS", competition.ROW_TOKENS + 1)
    assert compete(trajectory, Choice(2, 3), rounds=ROUNDS)[1] == kept


def test_rows_that_are_too_far_for_what_is_linear_are_not_taken(mlp, monkeypatch):
    tokens, rows, down = mlp
    monkeypatch.setattr(module, "STEPS", 80)  # all the way
    adapted = rows.clone()
    adapt_rows(tokens, adapted, down)
    assert torch.equal(adapted, rows)
    monkeypatch.setattr(module, "_unexplained", lambda *_: 0.0)
    adapt_rows(tokens, adapted, down)
    far, near = added(tokens, *adapted.chunk(2), down), added(tokens, *rows.chunk(2), down)
    assert float((far[0] - far[1]).norm()) > float((near[0] - near[1]).norm())
