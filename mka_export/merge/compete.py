"""Two layers become one: the neurons of both compete for its places."""

from __future__ import annotations

import torch
from torch import Tensor

from mka_export.merge.fit_tokens import FIT_TOKENS, ROWS, FitTokens, attention_weights, normed
from mka_export.merge.fuse import FLOAT, Fused
from mka_export.merge.ridge import Fit, ridge, ridge_values
from mka_export.merge.rows import adapt_rows, rows_bytes
from mka_export.merge.states import StatesFile
from mka_export.merge.trajectory import Trajectory
from mka_export.models.outline import Outline

ROUNDS = 2  # that the rows of a merge are adapted in; on trial they are not
ROW_TOKENS = 8  # for each input, at least, where rows are adapted: half as many save 3 % of a merge's KL, not 10
SELECTION_TOKENS = 8192  # that decide which neurons stay; 2 048 make SmolLM2 at 24 layers 2 % worse


def competition_bytes(model: Outline, tokens: int) -> int:
    """The largest of what ``compete`` holds: the choice of neurons, the fit of their rows or of ``down_proj``, in float32."""
    hidden, width = model.layer[model.architecture.layer["down"]]
    both = 2 * width
    choice = ridge_values(min(tokens, SELECTION_TOKENS), both, hidden) + both * hidden + 3 * FIT_TOKENS * both
    fit = ridge_values(tokens, width, hidden) + 4 * width * hidden + 3 * FIT_TOKENS * width
    return max(FLOAT * max(choice, fit), rows_bytes(hidden, width) if _adapted(tokens, hidden) else 0)


def _adapted(tokens: int, hidden: int) -> bool:
    """Whether so many tokens tell how rows with ``hidden`` inputs should change: if not, most of a fit's time is saved."""
    return tokens >= ROW_TOKENS * hidden


def compete(
    trajectory: Trajectory, position: int, last: int, alpha: float, rounds: int = 0
) -> tuple[Fused, dict[str, float]]:
    """Let both layers' MLP neurons compete for the merged layer's places, and refit them.

    The lower layer keeps its attention. Gate and up rows of both layers are put under each other, each
    multiplied by its own norm's weight so that all read the same normalised stream. A ridge regression of
    all their activations on what the original model has after the upper layer, over some of the tokens, gives
    each neuron an output; those that contribute most (‖output‖ × root mean square of the activation) stay, as
    many as one layer holds, and a second regression, over all tokens, fits their outputs. Both are pulled to
    the layers' own weights.

    ``alpha`` plays no part: the data say how many neurons each layer keeps. See docs/method.md.

    Args:
        rounds: so many times the rows are adapted to the outputs (``rows.adapt_rows``), and these are fitted again, where
            there are ``ROW_TOKENS`` tokens for each input.
    """
    roles = trajectory.runner.checkpoint.architecture.layer
    tokens = FitTokens(trajectory, position, last, relative=True)
    rows, down, from_upper = _strongest(trajectory, (position, last), tokens)
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
        **attention_weights(trajectory, position),
        roles["mlp_norm"]: scale,
        roles["gate"]: gate.div_(scale),
        roles["up"]: up.div_(scale),
        roles["down"]: fit.weights,
    }
    return fused, {"neurons_from_upper": from_upper, "unexplained": fit.unexplained}


def _strongest(trajectory: Trajectory, places: tuple[int, int], tokens: FitTokens) -> tuple[Tensor, Tensor, float]:
    """Return rows (gate's, and below them up's) and ``down_proj`` of two layers' strongest neurons, the upper's share."""
    roles = trajectory.runner.checkpoint.architecture.layer
    name = roles["down"]
    down = torch.cat([trajectory.weights(place, name)[name] for place in places], dim=1)
    width = down.shape[1] // 2
    some = tokens.spread(SELECTION_TOKENS)
    files = [_activations(trajectory, place, tokens, some) for place in places]
    everyone = ridge(lambda: tokens.read_neurons(files, some), len(some), down)
    tokens.free(*files)
    strength = everyone.weights.norm(dim=0) * everyone.root_mean_square
    kept = strength.topk(width).indices.sort().values
    del everyone
    down = down[:, kept]
    parts = kept[kept < width], kept[kept >= width] - width
    rows = torch.cat(
        [
            normed(trajectory, place, roles[role])[part]
            for role in ROWS
            for place, part in zip(places, parts, strict=True)
        ]
    )
    return rows, down, len(parts[1]) / width


def _activations(trajectory: Trajectory, position: int, tokens: FitTokens, chosen: Tensor) -> StatesFile:
    """Put the activations of a layer's neurons on disk, so that one layer's rows are in memory at a time."""
    roles = trajectory.runner.checkpoint.architecture.layer
    gate, up = (normed(trajectory, position, roles[role]) for role in ROWS)
    return tokens.neurons_on_disk(gate, up, chosen)
