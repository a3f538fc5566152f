"""What a merge will take: the sizes of what ``stage``, ``trajectory``, ``fuse`` and ``ridge`` hold."""

from __future__ import annotations

import math

from mka_export.merge.fuse import FIT_TOKENS, SELECTION_TOKENS
from mka_export.merge.stage import PROBE_WINDOWS
from mka_export.models.checkpoint import SHARD_BYTES
from mka_export.models.outline import Outline
from mka_export.models.runner import layer_pass_bytes
from mka_export.needs import Need

FLOAT = 4


def merge_need(model: Outline, remove: int, method: str, tokens: int, window: int) -> Need:
    """Return what merging takes.

    Args:
        model: the original.
        remove: how many layers go.
        method: a name in ``METHODS``.
        tokens: of the calibration text.
        window: tokens in each of its windows.
    """
    merged = model.with_layers(model.num_layers - remove)
    layer = FLOAT * sum(map(math.prod, model.layer.values()))
    probe = min(tokens, PROBE_WINDOWS * window)
    boundaries = 2 * (model.num_layers + 1)  # of the original, and of the model under merge
    states = boundaries * (tokens + (probe if probe < tokens else 0)) * model.hidden_size * FLOAT
    fit = (tokens * (2 * model.hidden_size + 1) + min(tokens, SELECTION_TOKENS) * _neurons(model)) * FLOAT
    largest = model.itemsize * max(map(math.prod, model.shapes.values()))
    work = {"mka": _competition_bytes(model, tokens), "mka-paper": 3 * layer}[method]
    return Need(
        kept=merged.nbytes,
        scratch=states + fit + remove * layer,
        memory=max(layer_pass_bytes(model), work, 2 * max(SHARD_BYTES, largest)),
    )


def _competition_bytes(model: Outline, tokens: int) -> int:
    """The larger of the two regressions of ``fuse.compete``: values of float32, in bytes."""
    hidden, both = model.hidden_size, _neurons(model)
    width = both // 2
    choice = _ridge_values(min(tokens, SELECTION_TOKENS), both, hidden) + both * hidden + 3 * FIT_TOKENS * both
    fit = _ridge_values(tokens, width, hidden) + 3 * width * hidden + 3 * FIT_TOKENS * width
    return FLOAT * max(choice, fit)


def _neurons(model: Outline) -> int:
    """The MLP neurons of two layers."""
    return 2 * model.layer[model.architecture.layer["down"]][1]


def _ridge_values(rows: int, features: int, outputs: int) -> int:
    """What ``ridge`` holds: a Gram matrix and its factor, then the change of the weights, and A where that is smaller."""
    if rows < features:
        return rows * (features + 2 * outputs) + max(2 * rows * rows, outputs * features)
    return features * (2 * features + 3 * outputs)
