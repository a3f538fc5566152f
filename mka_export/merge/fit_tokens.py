"""The tokens of a fit, and what a layer's neurons make of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mka_export.errors import UnsupportedError
from mka_export.merge.states import StatesFile
from mka_export.merge.steps import Choice
from mka_export.merge.trajectory import Trajectory
from mka_export.models.finite import check_finite
from mka_export.models.runner import LayerRunner

FIT_TOKENS = 512  # whose neurons are in memory at a time: 59 MB for the 28 672 of two layers of an 8B model
ROWS = ("gate", "up")  # the roles that read the stream


def attention_weights(runner: LayerRunner, index: int) -> dict[str, Tensor]:
    """Return the weights of an original layer before its MLP and the norm of that.

    Raises:
        UnsupportedError: the MLP has biases, which the fits are not written for.
    """
    checkpoint = runner.checkpoint
    norm = checkpoint.architecture.layer["mlp_norm"]
    mlp, found = checkpoint.architecture.mlp + ".", checkpoint.layer_names(index)
    names = [checkpoint.architecture.split(name)[1] for name in found]
    if any(name.startswith(mlp) and name.endswith(".bias") for name in names):
        raise UnsupportedError("neurons with biases cannot be fitted", "Use --method mka-paper.")
    return runner.weights(index, *(name for name in names if name != norm and not name.startswith(mlp)))


def normed(runner: LayerRunner, index: int, name: str) -> Tensor:
    """Return a matrix that reads the stream of an original layer's MLP, with the norm's weight multiplied in."""
    norm = runner.checkpoint.architecture.layer["mlp_norm"]
    weights = runner.weights(index, name, norm)
    return weights[name].mul_(weights[norm])


class FitTokens:
    """What the MLP of a merged layer reads, and what it should add, for every calibration token, on disk.

    What the original has after the highest layer that takes part is what the stream should be.

    Args:
        choice: the merge.
        relative: every token counts relative to its own stream, since later layers normalise what they read. (Some
            tokens, the first above all, have one hundreds of times larger, and would decide the fit.)

    Attributes:
        device: where it is computed.
        count: how many tokens there are.
        activation: of the MLP's gate.
    """

    def __init__(self, trajectory: Trajectory, choice: Choice, *, relative: bool) -> None:
        from transformers.activations import ACT2FN  # seconds, which bad input need not wait for

        runner, checkpoint = trajectory.runner, trajectory.runner.checkpoint
        self.device, self.count, self._folder = runner.device, trajectory.ids.numel(), trajectory.folder
        self._extra: list[StatesFile] = []
        self.activation = ACT2FN[checkpoint.config["hidden_act"]]
        self._inputs, self._targets, self._weights = (
            StatesFile(trajectory.folder / f"fit-{name}.f32", columns)
            for name, columns in (
                ("inputs", checkpoint.hidden_size),
                ("targets", checkpoint.hidden_size),
                ("weights", 1),
            )
        )
        kind, after = trajectory.attention(choice), trajectory.layers[choice.last].last + 1
        weights = attention_weights(runner, kind)
        # A norm's weight of 1 hands on the bare normalised stream.
        weights[checkpoint.architecture.layer["mlp_norm"]] = torch.ones(checkpoint.hidden_size, device=runner.device)
        first = 0
        for batch in trajectory.batches():
            stream, inputs = runner.before_mlp(kind, weights, trajectory.before(choice.position, batch))
            check_finite(stream, f"layer {kind}, merged", trajectory.windows[batch])
            original = trajectory.original(after, batch)
            size = original.square().mean(dim=-1, keepdim=True)
            weight = size.rsqrt() if relative else torch.ones_like(size)
            self._inputs.write(first, inputs.flatten(0, 1))
            self._targets.write(first, (weight * (original - stream)).flatten(0, 1))
            self._weights.write(first, weight.flatten(0, 1))
            first += weight.numel()

    def spread(self, count: int) -> Tensor:
        """Return the indices of at most ``count`` tokens, evenly spread over all."""
        return torch.linspace(0, self.count - 1, min(count, self.count)).round().long()

    def neurons(self, gate: Tensor, up: Tensor, chosen: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the activations of neurons with rows ``gate`` and ``up``, and their targets, for some tokens or all."""
        for inputs, targets, weight in self.blocks(chosen):
            yield self.activation(inputs @ gate.T).mul_(inputs @ up.T).mul_(weight), targets

    def scratch(self, columns: int) -> StatesFile:
        """Return a new file for a value of each of so many neurons for each token."""
        self._extra.append(StatesFile(self._folder / f"fit-neurons-{len(self._extra)}.f32", columns))
        return self._extra[-1]

    def free(self, *files: StatesFile) -> None:
        """Free the disk that files of ``scratch`` take."""
        for file in files:
            self._extra.remove(file)
            file.path.unlink()

    def neurons_on_disk(self, gate: Tensor, up: Tensor, chosen: Tensor) -> StatesFile:
        """Write the activations of neurons for some tokens; returns the file: (len(chosen), neurons)."""
        file, first = self.scratch(len(gate)), 0
        for activations, _ in self.neurons(gate, up, chosen):
            file.write(first, activations)
            first += len(activations)
        return file

    def targets(self, chosen: Tensor) -> Tensor:
        """Return what the MLP should add for some tokens, times its weight: (len(chosen), hidden)."""
        return torch.cat([targets for (targets,) in self._read(chosen, self._targets)])

    def blocks(self, chosen: Tensor | None = None) -> Iterator[list[Tensor]]:
        """Yield what the MLP reads (n, hidden), what it should add (n, hidden) and how much that counts (n, 1).

        The targets are multiplied by the weight already. At most ``FIT_TOKENS`` tokens at a time, of the ``chosen`` or all.
        """
        return self._read(chosen, self._inputs, self._targets, self._weights)

    def _read(self, chosen: Tensor | None, *files: StatesFile) -> Iterator[list[Tensor]]:
        for start in range(0, self.count, FIT_TOKENS):
            rows = slice(start, min(start + FIT_TOKENS, self.count))
            found = [file.read(rows).to(self.device) for file in files]
            if chosen is not None:
                here = (chosen[(chosen >= start) & (chosen < rows.stop)] - start).to(self.device)
                found = [each[here] for each in found]
            yield found

    def delete(self) -> None:
        """Free the disk of everything."""
        for file in (self._inputs, self._targets, self._weights, *self._extra):
            file.path.unlink()
