"""Merges that are measured and not kept, all from one pass of the original over the calibration text."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mka_export.errors import UnsupportedError, UsageError
from mka_export.memory import PeakMemory
from mka_export.merge.choose import Settings
from mka_export.merge.stage import PLAN, dense_pass, trial
from mka_export.models.checkpoint import Checkpoint, read_json
from mka_export.models.finite import MakesNaN
from mka_export.parity.comparison import MERGED, ORIGINAL
from mka_export.parity.metrics import ARTIFACT, Scores, score
from mka_export.parity.mmlu.answers import LogLetters
from mka_export.parity.runtimes import Windows
from mka_export.pipeline.job import Job
from mka_export.publish import write_json
from mka_export.report import with_nulls
from mka_export.workspace import kept_pieces, pieces_folder

STATES = "states"  # not a stage: what all of them begin with
RESULT = "result.json"

Means = NDArray[np.float64]  # (windows,): the mean over a window's predicted tokens


@dataclasses.dataclass(frozen=True)
class Trial:
    """What came of one.

    Attributes:
        plan: the file.
        error: why so many layers cannot be merged so; None where they can.
        nll, kl, top1: of the merged checkpoint, in torch: loss, divergence from the original in nats, and share of tokens
            with the same most likely next. The last two are empty unless they were asked for, all where it failed.
        letters: its answers to the job's questions (questions, 4); empty where none are asked.
        seconds: that choosing and fusing took, those of earlier runs included.
        peak_memory_bytes: of anonymous memory that they took.
    """

    plan: Path
    error: str | None
    nll: Means
    kl: Means
    top1: Means
    letters: LogLetters
    seconds: float
    peak_memory_bytes: int


class Trials:
    """The merges that a job tries, each a stage that holds its plan and its figures.

    Args:
        job: opened, with its workspace.
        windows: token ids to measure on (N, T).
        divergence: the trials are compared with the original token by token; else only by their losses, and the original's
            states are not in memory while others are merged.
    """

    def __init__(self, job: Job, windows: Windows, *, divergence: bool) -> None:
        self._job, self._windows, self._divergence = job, windows, divergence
        self._asks = divergence and job.asking.wanted
        self._inputs = {
            **job.inputs(job.original),
            **job.evaluation_inputs(),
            "windows": hashlib.sha256(windows.tobytes()).hexdigest(),
            "device": job.device.device,
        }

    def original(self, name: str) -> Means:
        """Return the original's losses, from stage ``name`` or for it."""
        job = self._job

        def make(stage: Path, pieces: Path) -> None:
            write_json(stage / RESULT, _means(score(self._windows, job.reference, {}, job.progress)))
            if not self._divergence:
                job.reference.close()

        return _array(read_json(job.workspace.stage(name, self._inputs, make).path / RESULT), "nll")

    def carry_out(self, settings: Settings, group: str) -> Trial:
        """Merge and measure.

        Args:
            group: the folder of the stage. Finished merges are kept beside it, for other trials of the group: where each
                merge follows from those before it (``Method.stepwise``), for another number of layers too.
        """
        job, layers = self._job, self._job.original.num_layers - settings.remove
        merge = dataclasses.asdict(settings)
        merged = {**self._inputs, "calibration": job.calibration.sha256, "merge": merge}
        shared = {**merged, "merge": {**merge, "remove": None}}
        inputs = {**merged, "questions": job.asking.inputs if self._asks else None}

        def make(stage: Path, pieces: Path) -> None:
            try:
                found = self._try(settings, stage, kept_pieces(job.workspace.path / group, shared))
            except (UsageError, UnsupportedError, MakesNaN) as error:
                found = {"error": str(error)}
            write_json(stage / RESULT, found)

        path = job.workspace.stage(f"{group}/{layers}-layers", inputs, make).path
        found = read_json(path / RESULT)
        nll, kl, top1 = (_array(found, key) for key in ("nll", "kl", "top1"))
        cost = found.get("seconds", 0.0), found.get("peak_memory_bytes", 0)
        letters = _array(found, "letters").astype(np.float32)
        return Trial(path / PLAN, found.get("error"), nll, kl, top1, letters, *cost)

    def _try(self, settings: Settings, folder: Path, pieces: Path) -> dict[str, Any]:
        """Merge, measure, and leave only the plan in ``folder``.

        Raises:
            UsageError, UnsupportedError, MakesNaN: the layers cannot be merged so, or make NaN.
        """
        job, merged, states, text = self._job, folder / MERGED, self._states, self._job.calibration
        merged.mkdir()
        try:
            with PeakMemory() as peak:
                plan, seconds = trial(
                    job.runner, text.ids, text.describe(), settings, merged, pieces, states, job.progress
                )
            references = {ORIGINAL: job.reference} if self._divergence else {}
            made = job.runtime(Checkpoint.open(merged))
            scores = score(self._windows, made, references, job.progress)
            asked = {"letters": with_nulls(job.asking.letters(made).tolist())} if self._asks else {}
        finally:
            shutil.rmtree(merged)
        write_json(folder / PLAN, plan.to_dict())
        return {"seconds": round(seconds, 2), "peak_memory_bytes": peak.nbytes, **_means(scores), **asked}

    @cached_property
    def _states(self) -> Path:
        """The folder of the original's states over the calibration text, computed once."""
        job = self._job
        inputs = {**job.inputs(job.original), "calibration": job.calibration.sha256}
        folder = kept_pieces(job.workspace.path / STATES, inputs)
        dense_pass(job.runner, job.calibration.ids, folder, job.progress)
        return folder

    def end(self, group: str = STATES) -> None:
        """Free the disk of what the trials of a group share; by default of what all share."""
        shutil.rmtree(pieces_folder(self._job.workspace.path / group), ignore_errors=True)


def _means(scores: Scores) -> dict[str, Any]:
    """Return the mean of each window, for JSON."""
    values = {"nll": scores.nll[ARTIFACT]}
    if divergence := scores.divergence.get(ORIGINAL):
        values |= {"kl": divergence.kl, "top1": divergence.same_top}
    found: dict[str, Any] = with_nulls({name: each.mean(axis=1).tolist() for name, each in values.items()})
    return found


def _array(found: Mapping[str, Any], key: str) -> Means:
    return np.array(found.get(key, []), dtype=np.float64)  # None becomes NaN
