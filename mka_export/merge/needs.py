"""What a merge will take, of disk and memory."""

from __future__ import annotations

import math

from mka_export.merge.compete import SELECTION_TOKENS
from mka_export.merge.fuse import FLOAT
from mka_export.merge.methods import METHODS
from mka_export.merge.views import ECHO, TRIAL_WINDOWS, probe_windows
from mka_export.models.checkpoint_writer import SHARD_BYTES
from mka_export.models.outline import Outline
from mka_export.models.runner import layer_pass_bytes
from mka_export.needs import Need


def merge_need(model: Outline, remove: int, method: str, tokens: int, window: int) -> Need:
    """Return what merging takes.

    Args:
        model: the original.
        remove: how many layers go.
        method: a name in ``METHODS``.
        tokens: of the calibration text.
        window: tokens in each of its windows.
    """
    hidden, width = model.layer[model.architecture.layer["down"]]
    layer = FLOAT * sum(map(math.prod, model.layer.values()))
    windows = tokens // window
    probe = len(probe_windows(windows))
    few = min(windows, probe + TRIAL_WINDOWS) if windows > probe else 0
    # The states of the original, and of the model under merge: those of the trials are freed before all are fitted.
    states = (
        (model.num_layers + 1) * (2 * tokens + (few + min(few, probe)) * window + 4 * ECHO * probe) * hidden * FLOAT
    )
    competing = (remove + 1) * min(tokens, SELECTION_TOKENS)
    fit = (tokens * (2 * hidden + 1) + max(2 * tokens, competing) * width + 2 * width * hidden) * FLOAT
    largest = model.itemsize * max(map(math.prod, model.shapes.values()))
    return Need(
        kept=model.with_layers(model.num_layers - remove).nbytes,
        scratch=states + fit + remove * layer,
        memory=max(layer_pass_bytes(model), METHODS[method].memory(model, tokens), 2 * max(SHARD_BYTES, largest)),
    )


def similarity_need(model: Outline, tokens: int, window: int) -> Need:
    """Return the disk that looking at the layers' similarity takes; arguments as for ``merge_need``."""
    probe = len(probe_windows(tokens // window)) * window
    states = ((model.num_layers + 1) * probe + tokens) * model.hidden_size * FLOAT
    return Need(scratch=states)
