"""Layers become one: the neurons of all compete for its places."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from mka_export.merge.fit_tokens import FIT_TOKENS, ROWS, FitTokens, attention_weights, normed
from mka_export.merge.fuse import FLOAT, Fused
from mka_export.merge.ridge import Fit, Part, pull, ridge, ridge_in_parts, ridge_values
from mka_export.merge.rows import adapt_rows, rows_bytes
from mka_export.merge.states import StatesFile
from mka_export.merge.steps import Choice
from mka_export.merge.trajectory import Trajectory
from mka_export.models.outline import Outline
from mka_export.models.runner import LayerRunner

ROUNDS = 2  # that the rows of a merge are adapted in; on trial they are not
ROW_TOKENS = 8  # for each input, at least, where rows are adapted: half as many save 3 % of a merge's KL, not 10
SELECTION_TOKENS = 4096  # that decide which neurons stay; 2 048 make SmolLM2 at 24 layers 2 % worse


def competition_bytes(model: Outline, tokens: int) -> int:
    """The largest of what ``compete`` holds: the choice of neurons, the fit of their rows or of ``down_proj``, in float32."""
    hidden, width = model.layer[model.architecture.layer["down"]]
    some = min(tokens, SELECTION_TOKENS)
    choice = ridge_values(some, max(width, some), hidden) + 2 * width * hidden
    fit = ridge_values(tokens, width, hidden) + 4 * width * hidden + 3 * FIT_TOKENS * width
    return max(FLOAT * max(choice, fit), rows_bytes(hidden, width) if _adapted(tokens, hidden) else 0)


def _adapted(tokens: int, hidden: int) -> bool:
    """Whether so many tokens tell how rows with ``hidden`` inputs should change: if not, most of a fit's time is saved."""
    return tokens >= ROW_TOKENS * hidden


def compete(trajectory: Trajectory, choice: Choice, rounds: int = 0) -> tuple[Fused, dict[str, float]]:
    """Let the MLP neurons of all original layers that take part compete for the merged layer's places, and refit them.

    One of them keeps its attention, ``choice.attention``. Gate and up rows of all are put under each other, each
    multiplied by its own norm's weight so that all read the same normalised stream. A ridge regression of
    all their activations on what the original model has after the highest layer, over some of the tokens, gives
    each neuron an output; those that contribute most (‖output‖ × root mean square of the activation) stay, as
    many as one layer holds, and a second regression, over all tokens, fits their outputs. Both are pulled to
    the layers' own weights. What earlier merges made of a layer plays no part, except in the stream below.

    ``choice.alpha`` plays no part: the data say how many neurons each layer keeps. See docs/method.md.

    Args:
        rounds: so many times the rows are adapted to the outputs (``rows.adapt_rows``), and these are fitted again, where
            there are ``ROW_TOKENS`` tokens for each input.
    """
    roles = trajectory.runner.checkpoint.architecture.layer
    tokens = FitTokens(trajectory, choice, relative=True)
    taken = range(trajectory.layers[choice.position].first, trajectory.layers[choice.last].last + 1)
    rows, down, from_lowest = _strongest(trajectory.runner, taken, tokens)
    gate, up = rows.chunk(2)

    def outputs() -> Fit:
        return ridge(lambda: tokens.neurons(gate, up), tokens.count, down)

    fit = outputs()
    for _ in range(rounds if _adapted(tokens.count, rows.shape[1]) else 0):
        adapt_rows(tokens, rows, fit.weights)
        del fit  # its weights need not be in memory while others are sought
        fit = outputs()
    tokens.delete()
    # Scale moves freely between the norm and the columns: even columns quantize best.
    scale = ((gate.square().mean(dim=0) + up.square().mean(dim=0)) / 2).sqrt().clamp_min(1e-6)
    fused = {
        **attention_weights(trajectory.runner, trajectory.attention(choice)),
        roles["mlp_norm"]: scale,
        roles["gate"]: gate.div_(scale),
        roles["up"]: up.div_(scale),
        roles["down"]: fit.weights,
    }
    return fused, {"neurons_from_lowest": from_lowest, "unexplained": fit.unexplained}


def _strongest(runner: LayerRunner, layers: Sequence[int], tokens: FitTokens) -> tuple[Tensor, Tensor, float]:
    """Return rows (gate's, and below them up's) and ``down_proj`` of layers' strongest neurons, the lowest's share."""
    roles = runner.checkpoint.architecture.layer
    strengths = _strengths(runner, layers, tokens)
    width = len(strengths[0])
    kept = torch.cat(strengths).topk(width).indices.sort().values
    parts = [(i, kept[kept // width == place] - place * width) for place, i in enumerate(layers)]
    rows = torch.cat([normed(runner, i, roles[role])[part] for role in ROWS for i, part in parts])
    down = torch.cat([_down(runner, i)[:, part] for i, part in parts], dim=1)
    return rows, down, len(parts[0][1]) / width


def _strengths(runner: LayerRunner, layers: Sequence[int], tokens: FitTokens) -> list[Tensor]:
    """Return how much each neuron of each layer contributes if all stood in the merged one: (neurons,) of each."""
    some = tokens.spread(SELECTION_TOKENS)
    files = [_activations(runner, i, tokens, some) for i in layers]
    targets = tokens.targets(some)
    parts = [
        Part(partial(_read, file, targets), partial(_down, runner, i)) for i, file in zip(layers, files, strict=True)
    ]
    strength = pull(len(some), sum(file.features for file in files))
    fits = ridge_in_parts(parts, targets, strength)
    found = [fit.weights.norm(dim=0) * fit.root_mean_square for fit in fits]
    tokens.free(*files)
    return found[::-1]


def _activations(runner: LayerRunner, index: int, tokens: FitTokens, chosen: Tensor) -> StatesFile:
    """Put the activations of a layer's neurons on disk, so that one layer's rows are in memory at a time."""
    roles = runner.checkpoint.architecture.layer
    gate, up = (normed(runner, index, roles[role]) for role in ROWS)
    return tokens.neurons_on_disk(gate, up, chosen)


def _read(file: StatesFile, like: Tensor) -> Tensor:
    """Return all activations in a file for the tokens of ``like``, on its device."""
    return file.read(slice(0, len(like))).to(like.device)


def _down(runner: LayerRunner, index: int) -> Tensor:
    name = runner.checkpoint.architecture.layer["down"]
    return runner.weights(index, name)[name]
