"""Merging a pico model in a line."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mka_export.merge.choose import Settings
from mka_export.merge.plan import Plan
from mka_export.merge.stage import merge_stage
from mka_export.models.checkpoint import Checkpoint
from mka_export.models.runner import LayerRunner
from mka_export.progress import Progress

QUIET = Progress(quiet=True)
WINDOWS = np.random.default_rng(1).integers(3, 600, size=(8, 48))
CALIBRATION = {"source": "test", "sha256": "0" * 64, "tokens": WINDOWS.size}


def settings(**changes: object) -> Settings:
    defaults = {"remove": 2, "method": "mka", "measure": "npib", "schedule": "iterative", "protect": 1, "alpha": None}
    return Settings(**defaults | changes)


def merged(model: Path, out: Path, how: Settings | Plan) -> Path:
    out.mkdir()
    pieces = out.with_name(f"{out.name}-pieces")
    pieces.mkdir(exist_ok=True)
    merge_stage(LayerRunner(Checkpoint.open(model)), WINDOWS, CALIBRATION, how, out, pieces, QUIET)
    return out
