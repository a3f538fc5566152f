"""Two layers become one: the methods.

Every method takes the place of a pair in the model under merge and returns the weights of the one layer
that stands there afterwards, with the tensors and shapes of the family: the architecture does not change.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from mka_export.errors import MkaError, UnsupportedError
from mka_export.merge.trajectory import Trajectory

Fused = dict[str, Tensor]
METHODS: dict[str, Callable[[Trajectory, int, float], tuple[Fused, dict[str, float]]]] = {}

RIDGE = 0.1


def method(name: str) -> Callable[..., Callable[..., tuple[Fused, dict[str, float]]]]:
    """Register a way to fuse: ``(trajectory, position, alpha) -> (weights, figures for the plan)``."""

    def register(
        function: Callable[..., tuple[Fused, dict[str, float]]],
    ) -> Callable[..., tuple[Fused, dict[str, float]]]:
        METHODS[name] = function
        return function

    return register


@method("mka-paper")
def average(trajectory: Trajectory, position: int, alpha: float) -> tuple[Fused, dict[str, float]]:
    """θ = α θ_l + (1 − α) θ_m for every tensor of the layers (arXiv 2406.16330, eq. 9).

    Raises:
        UnsupportedError: the two layers do not have the same tensors.
    """
    lower, upper = trajectory.weights(position), trajectory.weights(position + 1)
    if lower.keys() != upper.keys() or any(lower[n].shape != upper[n].shape for n in lower):
        raise UnsupportedError(
            f"layers {position} and {position + 1} have different tensors", "They cannot be averaged."
        )
    return {name: torch.lerp(upper[name], lower[name], alpha) for name in lower}, {}


@method("mka")
def compete(trajectory: Trajectory, position: int, alpha: float) -> tuple[Fused, dict[str, float]]:
    """Let both layers' MLP neurons compete for the merged layer's places, and refit ``down_proj``.

    The lower layer keeps its attention. Gate and up rows of both layers are put under each other, each
    multiplied by its own norm's weight so that all read the same normalised stream. One ridge regression
    of all their activations on what the original model has after the upper layer gives each neuron an
    output; those that contribute most (‖output‖ × root mean square of the activation) stay, as many as one
    layer holds, and a second regression fits their outputs. Both are pulled to the layers' own weights.

    ``alpha`` plays no part: the data say how many neurons each layer keeps. See docs/method.md.
    """
    runner, roles = trajectory.runner, trajectory.runner.checkpoint.architecture.layer
    lower, upper = trajectory.weights(position), trajectory.weights(position + 1)
    if f"{_path(roles['gate'])}.bias" in lower or f"{_path(roles['down'])}.bias" in lower:
        raise UnsupportedError("neurons with biases cannot compete", "Use --method mka-paper.")
    activation = ACT2FN[runner.checkpoint.config["hidden_act"]]
    width = lower[roles["down"]].shape[1]
    gate = torch.cat([layer[roles["gate"]] * layer[roles["mlp_norm"]] for layer in (lower, upper)])
    up = torch.cat([layer[roles["up"]] * layer[roles["mlp_norm"]] for layer in (lower, upper)])
    down = torch.cat([lower[roles["down"]], upper[roles["down"]]], dim=1)

    # With its norm's weight 1, the lower layer hands its MLP the bare normalised stream.
    bare = {**lower, roles["mlp_norm"]: torch.ones_like(lower[roles["mlp_norm"]])}
    kind = trajectory.layers[position].first
    normal = NormalEquations(2 * width, down.shape[0], runner.device)
    for batch in trajectory.batches():
        seen: dict[str, Tensor] = {}
        states = trajectory.before(position, batch)
        with runner.watch(kind, seen.__setitem__):
            after = runner.run_layer(kind, bare, states)
        inputs, neurons = seen[_path(roles["gate"])], seen[_path(roles["down"])]
        stream = after - neurons @ bare[roles["down"]].T  # what the MLP adds to
        rows = activation(inputs @ gate.T) * (inputs @ up.T)
        original = trajectory.target(position + 1, batch)
        # Every later layer normalises its input, so errors count relative to the token's own stream. (Some
        # tokens, the first above all, have one hundreds of times larger, and would decide the fit.)
        weight = original.square().mean(dim=-1, keepdim=True).rsqrt()
        normal.add((weight * rows).flatten(0, 1), (weight * (original - stream)).flatten(0, 1))

    everything = normal.solve(down)
    strength = everything.norm(dim=0) * normal.root_mean_square
    kept = strength.topk(width).indices.sort().values
    chosen = normal.subset(kept)
    fitted = chosen.solve(down[:, kept])
    gate, up = gate[kept], up[kept]
    # Scale moves freely between the norm and the columns: even columns quantize best.
    scale = torch.cat([gate, up]).square().mean(dim=0).sqrt().clamp_min(1e-6)
    fused = {
        **lower,
        roles["mlp_norm"]: scale,
        roles["gate"]: gate / scale,
        roles["up"]: up / scale,
        roles["down"]: fitted,
    }
    return fused, {
        "neurons_from_upper": float((kept >= width).float().mean()),
        "unexplained": chosen.unexplained(fitted),
    }


class NormalEquations:
    """Least squares Y ≈ A Wᵀ from streamed rows: only AᵀA and AᵀY are kept, in float64.

    Args:
        features: columns of A. outputs: columns of Y.
    """

    def __init__(self, features: int, outputs: int, device: torch.device) -> None:
        self.gram = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.cross = torch.zeros(features, outputs, dtype=torch.float64, device=device)
        self.energy = 0.0
        self.rows = 0

    def add(self, rows: Tensor, targets: Tensor) -> None:
        """Add rows (n, features) and their targets (n, outputs)."""
        self.gram += rows.T @ rows
        self.cross += rows.T @ targets
        self.energy += float(targets.square().sum(dtype=torch.float64))
        self.rows += len(rows)

    @property
    def root_mean_square(self) -> Tensor:
        """The root mean square of each feature, float32."""
        return (self.gram.diagonal() / self.rows).sqrt().float()

    def subset(self, features: Tensor) -> NormalEquations:
        """Return the equations for some of the features."""
        part = NormalEquations(0, 0, self.gram.device)
        part.gram, part.cross = self.gram[features][:, features], self.cross[features]
        part.energy, part.rows = self.energy, self.rows
        return part

    def solve(self, prior: Tensor) -> Tensor:
        """Return W (outputs, features) minimising ‖A Wᵀ − Y‖² + Σ_j λ_j ‖w_j − prior_j‖², λ_j = RIDGE (AᵀA)_jj.

        So what is held back is the change of each feature's contribution, whatever the feature's own scale.

        Raises:
            MkaError: the equations are singular, or hold NaN.
        """
        diagonal = self.gram.diagonal()
        ridge = RIDGE * (diagonal + 1e-6 * diagonal.mean())
        damped = self.gram + torch.diag(ridge)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) != 0:
            raise MkaError(
                "the calibration text leaves a least-squares fit singular", "Give more, and more varied, text."
            )
        return torch.cholesky_solve(self.cross + ridge[:, None] * prior.T.double(), factor).T.float()

    def unexplained(self, weights: Tensor) -> float:
        """Return ‖A Wᵀ − Y‖² / ‖Y‖²: the share of the targets' energy that is left."""
        w = weights.T.double()
        left = self.energy - 2 * float((self.cross * w).sum()) + float((w * (self.gram @ w)).sum())
        return max(0.0, left / self.energy)


def _path(weight: str) -> str:
    return weight.rpartition(".")[0]
