"""Two layers become one: the methods.

Every method takes the place of a pair in the model under merge and returns the weights of the one layer
that stands there afterwards, with the tensors and shapes of the family: the architecture does not change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mka_export.errors import UnsupportedError
from mka_export.merge.ridge import ridge, ridge_values
from mka_export.merge.states import StatesFile
from mka_export.merge.trajectory import Trajectory
from mka_export.models.outline import Outline
from mka_export.models.runner import check_finite

Fused = dict[str, Tensor]
METHODS: dict[str, Callable[[Trajectory, int, float], tuple[Fused, dict[str, float]]]] = {}
MEMORY: dict[str, Callable[[Outline, int], int]] = {}

FLOAT = 4  # bytes
ROWS = ("gate", "up")  # the roles that read the stream
SELECTION_TOKENS = 8192  # that decide which neurons stay; 2 048 make SmolLM2 at 24 layers 2 % worse
FIT_TOKENS = 512  # whose neurons are in memory at a time: 59 MB for the 28 672 of two layers of an 8B model


def method(
    name: str, memory: Callable[[Outline, int], int]
) -> Callable[..., Callable[..., tuple[Fused, dict[str, float]]]]:
    """Register a way to fuse: ``(trajectory, position, alpha) -> (weights, figures for the plan)``.

    Args:
        name: of ``--method``.
        memory: ``(model, calibration tokens) -> bytes`` that it holds at most.
    """

    def register(
        function: Callable[..., tuple[Fused, dict[str, float]]],
    ) -> Callable[..., tuple[Fused, dict[str, float]]]:
        METHODS[name], MEMORY[name] = function, memory
        return function

    return register


def _average_bytes(model: Outline, tokens: int) -> int:
    """Two layers and the one made of them, in float32."""
    return 3 * FLOAT * sum(map(math.prod, model.layer.values()))


@method("mka-paper", _average_bytes)
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


def _competition_bytes(model: Outline, tokens: int) -> int:
    """The larger of the two regressions of ``compete``, in float32."""
    hidden, width = model.layer[model.architecture.layer["down"]]
    both = 2 * width
    choice = ridge_values(min(tokens, SELECTION_TOKENS), both, hidden) + both * hidden + 3 * FIT_TOKENS * both
    fit = ridge_values(tokens, width, hidden) + 3 * width * hidden + 3 * FIT_TOKENS * width
    return FLOAT * max(choice, fit)


@method("mka", _competition_bytes)
def compete(trajectory: Trajectory, position: int, alpha: float) -> tuple[Fused, dict[str, float]]:
    """Let both layers' MLP neurons compete for the merged layer's places, and refit ``down_proj``.

    The lower layer keeps its attention. Gate and up rows of both layers are put under each other, each
    multiplied by its own norm's weight so that all read the same normalised stream. A ridge regression of
    all their activations on what the original model has after the upper layer, over some of the tokens, gives
    each neuron an output; those that contribute most (‖output‖ × root mean square of the activation) stay, as
    many as one layer holds, and a second regression, over all tokens, fits their outputs. Both are pulled to
    the layers' own weights.

    ``alpha`` plays no part: the data say how many neurons each layer keeps. See docs/method.md.
    """
    roles = trajectory.runner.checkpoint.architecture.layer
    found = trajectory.runner.checkpoint.layer(trajectory.layers[position].first)
    mlp = trajectory.runner.checkpoint.architecture.mlp + "."
    if any(name.startswith(mlp) and name.endswith(".bias") for name in found):
        raise UnsupportedError("neurons with biases cannot compete", "Use --method mka-paper.")
    attention = [name for name in found if not name.startswith(mlp)]
    tokens = _Tokens(trajectory, position, attention)

    places, name = (position, position + 1), roles["down"]
    down = torch.cat([trajectory.weights(place, name)[name] for place in places], dim=1)
    width = down.shape[1] // 2
    some = tokens.spread(SELECTION_TOKENS)
    files = [_activations(trajectory, place, tokens, some) for place in places]
    everyone = ridge(lambda: tokens.read_neurons(files, some), len(some), down)
    strength = everyone.weights.norm(dim=0) * everyone.root_mean_square
    kept = strength.topk(width).indices.sort().values
    del everyone
    down = down[:, kept]
    parts = kept[kept < width], kept[kept >= width] - width
    gate, up = (
        torch.cat([_normed(trajectory, place, roles[role])[part] for place, part in zip(places, parts, strict=True)])
        for role in ROWS
    )
    fit = ridge(lambda: tokens.neurons(gate, up), tokens.count, down)
    tokens.delete()
    # Scale moves freely between the norm and the columns: even columns quantize best.
    scale = ((gate.square().mean(dim=0) + up.square().mean(dim=0)) / 2).sqrt().clamp_min(1e-6)
    fused = {
        **trajectory.weights(position, *attention),
        roles["mlp_norm"]: scale,
        roles["gate"]: gate.div_(scale),
        roles["up"]: up.div_(scale),
        roles["down"]: fit.weights,
    }
    return fused, {
        "neurons_from_upper": float((kept >= width).float().mean()),
        "unexplained": fit.unexplained,
    }


def _normed(trajectory: Trajectory, position: int, name: str) -> Tensor:
    """Return a matrix that reads the stream of its layer's MLP, with the norm's weight multiplied in."""
    norm = trajectory.runner.checkpoint.architecture.layer["mlp_norm"]
    weights = trajectory.weights(position, name, norm)
    return weights[name].mul_(weights[norm])


def _activations(trajectory: Trajectory, position: int, tokens: _Tokens, chosen: Tensor) -> StatesFile:
    """Put the activations of a layer's neurons on disk, so that one layer's rows are in memory at a time."""
    roles = trajectory.runner.checkpoint.architecture.layer
    gate, up = (_normed(trajectory, position, roles[role]) for role in ROWS)
    return tokens.neurons_on_disk(gate, up, chosen)


class _Tokens:
    """What the MLP of a pair's lower layer reads, and what it should add, for every calibration token, on disk."""

    def __init__(self, trajectory: Trajectory, position: int, attention: list[str]) -> None:
        from transformers.activations import ACT2FN  # seconds, which bad input need not wait for

        runner, checkpoint = trajectory.runner, trajectory.runner.checkpoint
        self.device, self.count, self._folder = runner.device, trajectory.ids.numel(), trajectory.folder
        self._extra: list[StatesFile] = []
        self._activation = ACT2FN[checkpoint.config["hidden_act"]]
        self._inputs, self._targets, self._weights = (
            StatesFile(trajectory.folder / f"fit-{name}.f32", columns)
            for name, columns in (
                ("inputs", checkpoint.hidden_size),
                ("targets", checkpoint.hidden_size),
                ("weights", 1),
            )
        )
        weights = trajectory.weights(position, *attention)
        norm = checkpoint.architecture.layer["mlp_norm"]
        weights[norm] = torch.ones_like(weights[norm])  # it hands on the bare normalised stream
        kind, first = trajectory.layers[position].first, 0
        for batch in trajectory.batches():
            stream, inputs = runner.before_mlp(kind, weights, trajectory.before(position, batch))
            check_finite(stream, f"layer {kind}, merged", trajectory.windows[batch])
            original = trajectory.target(position + 1, batch)
            # Every later layer normalises its input, so errors count relative to the token's own stream. (Some
            # tokens, the first above all, have one hundreds of times larger, and would decide the fit.)
            weight = original.square().mean(dim=-1, keepdim=True).rsqrt()
            self._inputs.write(first, inputs.flatten(0, 1))
            self._targets.write(first, (weight * (original - stream)).flatten(0, 1))
            self._weights.write(first, weight.flatten(0, 1))
            first += weight.numel()

    def spread(self, count: int) -> Tensor:
        """Return the indices of at most ``count`` tokens, evenly spread over all."""
        return torch.linspace(0, self.count - 1, min(count, self.count)).round().long()

    def neurons(self, gate: Tensor, up: Tensor, chosen: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the activations of neurons with rows ``gate`` and ``up``, and their targets, for some tokens or all."""
        for inputs, targets, weight in self._blocks(chosen, self._inputs, self._targets, self._weights):
            yield self._activation(inputs @ gate.T).mul_(inputs @ up.T).mul_(weight), targets

    def neurons_on_disk(self, gate: Tensor, up: Tensor, chosen: Tensor) -> StatesFile:
        """Write the activations of neurons for some tokens; returns the file: (len(chosen), neurons)."""
        self._extra.append(StatesFile(self._folder / f"fit-neurons-{len(self._extra)}.f32", len(gate)))
        first = 0
        for activations, _ in self.neurons(gate, up, chosen):
            self._extra[-1].write(first, activations)
            first += len(activations)
        return self._extra[-1]

    def read_neurons(self, files: list[StatesFile], chosen: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the activations in all of ``files``, side by side, and the targets of the tokens they are for."""
        first = 0
        for (targets,) in self._blocks(chosen, self._targets):
            rows = slice(first, first + len(targets))
            yield torch.cat([file.read(rows).to(self.device) for file in files], dim=1), targets
            first = rows.stop

    def _blocks(self, chosen: Tensor | None, *files: StatesFile) -> Iterator[list[Tensor]]:
        """Yield what is in ``files`` for ``FIT_TOKENS`` tokens at a time, of which the ``chosen`` ones."""
        for start in range(0, self.count, FIT_TOKENS):
            rows = slice(start, min(start + FIT_TOKENS, self.count))
            found = [file.read(rows).to(self.device) for file in files]
            if chosen is not None:
                here = (chosen[(chosen >= start) & (chosen < rows.stop)] - start).to(self.device)
                found = [each[here] for each in found]
            yield found

    def delete(self) -> None:
        """Free the disk."""
        for file in (self._inputs, self._targets, self._weights, *self._extra):
            file.path.unlink()
