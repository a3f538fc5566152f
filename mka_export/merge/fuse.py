"""Some layers become one: the simple ways.

Every way takes neighbours in the model under merge, and returns the weights of the one layer that stands there
afterwards, with the tensors and shapes of the family (the architecture does not change), and figures for the plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mka_export.errors import UnsupportedError
from mka_export.merge.fit_tokens import FIT_TOKENS, ROWS, FitTokens, normed
from mka_export.merge.ridge import ridge, ridge_values
from mka_export.merge.steps import Choice
from mka_export.merge.trajectory import Trajectory
from mka_export.models.outline import Outline

Fused = dict[str, Tensor]
Fuse = Callable[[Trajectory, Choice], tuple[Fused, dict[str, float]]]

FLOAT = 4  # bytes
MAP_RIDGE = 1e-4  # the paper's map has none; this much keeps float32 sound


def layers_bytes(model: Outline, tokens: int) -> int:
    """Return the memory of two layers and the one made of them, in float32."""
    return 3 * FLOAT * sum(map(math.prod, model.layer.values()))


def keep(trajectory: Trajectory, choice: Choice) -> tuple[Fused, dict[str, float]]:
    """Keep the lowest layer as it is: the others are dropped."""
    return trajectory.weights(choice.position), {}


def average(trajectory: Trajectory, choice: Choice) -> tuple[Fused, dict[str, float]]:
    """θ = α θ_l + (1 − α) θ_m for every tensor of two layers (arXiv 2406.16330, eq. 9).

    Raises:
        UnsupportedError: the two layers do not have the same tensors.
    """
    lower = trajectory.weights(choice.position)
    upper = _like(lower, trajectory, choice.position, choice.last)
    return {name: torch.lerp(upper[name], lower[name], choice.alpha) for name in lower}, {}


def collapse(trajectory: Trajectory, choice: Choice) -> tuple[Fused, dict[str, float]]:
    """θ = θ_l + Σ_m (θ_m − θ_l) for every tensor of the layers (LaCo, arXiv 2402.11187).

    Raises:
        UnsupportedError: the layers do not have the same tensors.
    """
    position = choice.position
    lower, total = trajectory.weights(position), trajectory.weights(position)
    for place in range(position + 1, choice.last + 1):
        upper = _like(lower, trajectory, position, place)
        for name, tensor in total.items():
            tensor.add_(upper[name]).sub_(lower[name])
    return total, {}


def _like(lower: Fused, trajectory: Trajectory, position: int, place: int) -> Fused:
    """Return the weights of the layer at ``place``, which has the tensors of the one at ``position``."""
    upper = trajectory.weights(place)
    if lower.keys() != upper.keys() or any(lower[n].shape != upper[n].shape for n in lower):
        raise UnsupportedError(f"layers {position} and {place} have different tensors", "They cannot be added.")
    return upper


def map_bytes(model: Outline, tokens: int) -> int:
    """Return the memory of ``linear_map``: an MLP's matrices, the neurons of some tokens, the regression."""
    hidden, width = model.layer[model.architecture.layer["down"]]
    return FLOAT * (3 * hidden * width + 3 * FIT_TOKENS * width + ridge_values(tokens, hidden, hidden))


def linear_map(trajectory: Trajectory, choice: Choice) -> tuple[Fused, dict[str, float]]:
    """Keep the lowest layer, its MLP's output mapped to what the dropped ones would have made of it (arXiv 2505.02819).

    The map T minimises ‖M T + R − Y‖²: M the MLP's output, R the stream that it is added to, Y the original's stream
    after the last layer. It is folded into ``down_proj``.
    """
    roles = trajectory.runner.checkpoint.architecture.layer
    tokens = FitTokens(trajectory, choice, relative=False)
    gate, up = (normed(trajectory.runner, trajectory.layers[choice.position].first, roles[role]) for role in ROWS)
    fused = trajectory.weights(choice.position)
    down = fused[roles["down"]]
    fit = ridge(
        lambda: ((neurons @ down.T, targets) for neurons, targets in tokens.neurons(gate, up)),
        tokens.count,
        torch.eye(len(down), device=down.device),
        strength=MAP_RIDGE,
    )
    tokens.delete()
    return {**fused, roles["down"]: fit.weights @ down}, {"unexplained": fit.unexplained}
