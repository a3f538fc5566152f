"""Merges that are measured and not kept, all from one pass of the original over the calibration text."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mka_export.memory import PeakMemory
from mka_export.merge.choose import Settings
from mka_export.merge.stage import PLAN, dense_pass, trial
from mka_export.parity.comparison import MERGED
from mka_export.parity.metrics import Scores, score
from mka_export.parity.runtimes import Runtime, Windows
from mka_export.parity.runtimes.torch_runtime import TorchRuntime
from mka_export.pipeline.job import Job
from mka_export.workspace import kept_pieces, pieces_folder, write_json

STATES = "states"  # not a stage: what all of them begin with


@dataclass(frozen=True)
class Trial:
    """What came of one.

    Attributes:
        seconds: that choosing and fusing took, those of earlier runs included.
        peak_memory: bytes of anonymous memory that they took.
        scores: of the merged checkpoint, in torch.
    """

    seconds: float
    peak_memory: int
    scores: Scores


class Trials:
    """The merges that a job tries.

    Args:
        job: opened, with its workspace.
    """

    def __init__(self, job: Job) -> None:
        self._job = job

    @cached_property
    def _states(self) -> Path:
        """The folder of the original's states over the calibration text, computed once."""
        job = self._job
        inputs = {**job.inputs(job.original), "calibration": job.calibration.sha256}
        folder = kept_pieces(job.workspace.path / STATES, inputs)
        dense_pass(job.runner, job.calibration.ids, folder, job.progress)
        return folder

    def carry_out(
        self, settings: Settings, folder: Path, pieces: Path, windows: Windows, references: Mapping[str, Runtime]
    ) -> Trial:
        """Merge, measure, and leave only the plan in ``folder``.

        Args:
            pieces: as for ``merge.stage.trial``.
            windows, references: as for ``parity.metrics.score``.

        Raises:
            UsageError, UnsupportedError, MakesNaN: the layers cannot be merged so, or make NaN.
        """
        job, merged, states = self._job, folder / MERGED, self._states
        merged.mkdir()
        try:
            text = job.calibration
            with PeakMemory() as peak:
                plan, seconds = trial(
                    job.runner, text.ids, text.describe(), settings, merged, pieces, states, job.progress
                )
            runtime = TorchRuntime(merged, device=job.device.device, progress=job.progress)
            scores = score(windows, runtime, references, job.progress)
        finally:
            shutil.rmtree(merged)
        write_json(folder / PLAN, plan.to_dict())
        return Trial(seconds, peak.nbytes, scores)

    def end(self) -> None:
        """Free the disk."""
        shutil.rmtree(pieces_folder(self._job.workspace.path / STATES), ignore_errors=True)
