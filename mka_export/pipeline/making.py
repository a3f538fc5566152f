"""Making: of a checkpoint the artifact of each target, made once, and measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mka_export.errors import ConversionError
from mka_export.merge.stage import ACTIVATIONS
from mka_export.models.activations import Activations, calibrate
from mka_export.models.checkpoint import Checkpoint, read_json
from mka_export.models.outline import Outline
from mka_export.pipeline.job import CALIBRATION, Job, stem
from mka_export.pipeline.measured import unmeasured
from mka_export.pipeline.measuring import Measuring, Subject
from mka_export.publish import write_json
from mka_export.target import Artifact, Target, load_converter

ARTIFACT = "artifact.json"


class Making:
    """The artifacts of one job.

    Args:
        job: opened, with its workspace, before anything is made.
        attribute: whether the artifacts' weights are measured in torch too.
    """

    def __init__(self, job: Job, *, attribute: bool) -> None:
        self._job, self._attribute = job, attribute
        self._measuring = Measuring(job)

    def entry(self, target: Target, lineage: Mapping[str, Checkpoint]) -> dict[str, Any]:
        """Make and measure an artifact: the report's entry for its target.

        Args:
            lineage: name -> what was made from the original, in order; the last is converted, or the original.
        """
        job, checkpoint = self._job, [self._job.original, *lineage.values()][-1]
        target = named(target, job.source.name, checkpoint.num_layers if lineage else None)
        activations = self._activations(checkpoint) if target.activations else None
        calibration = torch.from_numpy(job.calibration.ids) if target.calibration else None
        converter = load_converter(target.converter)
        inputs = {
            **job.inputs(checkpoint, *target.packages),
            **target_inputs(target),
            "activations": activations and [activations.calibration, activations.tokens],
            "calibration": job.calibration.sha256 if target.calibration else None,
        }

        def make(folder: Path, pieces: Path) -> None:
            made = converter.convert(
                checkpoint,
                target,
                folder,
                pieces,
                activations=activations,
                calibration=calibration,
                progress=job.progress,
            )
            fields = {"path": made.path.name, "files": made.files, "nbytes": made.nbytes, "details": made.details}
            write_json(folder / ARTIFACT, fields)

        try:
            need = converter.need(Outline.of_checkpoint(checkpoint), target)
            target.require_budget(need)
            stage = job.workspace.stage(target.name, inputs, make, kind=ARTIFACT)
        except ConversionError as error:
            job.progress.say(f"{target.name}: {error}")
            failed = unmeasured(target.runtime, str(error)).judged(target.conversion, target.compression)
            return {"name": target.name, "artifact": None, "budget": None, **failed}
        made = read_json(stage.path / ARTIFACT)
        artifact = Artifact(stage.path / made["path"], tuple(made["files"]), made["nbytes"], made["details"])
        subject = Subject(target, artifact, stage.files, dict(lineage), self._attribute)
        entry = self._measuring.entry(subject)
        if target.budget is not None:
            taken = target.budget.taken(artifact.nbytes, need.cache)
            entry["budget"] = {**dataclasses.asdict(target.budget), "taken": taken}
        return entry

    def _activations(self, checkpoint: Checkpoint) -> Activations:
        """Return those of what is converted: kept with a checkpoint that was made, else of one more pass."""
        job = self._job
        if checkpoint is not job.original:
            return Activations.load(checkpoint.path / ACTIVATIONS)

        def make(folder: Path, pieces: Path) -> None:
            ids = torch.from_numpy(job.calibration.ids)
            calibrate(job.runner, ids, job.calibration.sha256, job.progress).save(folder / ACTIVATIONS)

        inputs = {**job.inputs(checkpoint), "calibration": job.calibration.sha256}
        return Activations.load(job.workspace.stage(CALIBRATION, inputs, make).path / ACTIVATIONS)


def named(target: Target, model: str, layers: int | None) -> Target:
    """Return a target whose file is called after the model, and after its layers unless None."""
    name = stem(model) + (f"-{layers}L" if layers is not None else "")
    return dataclasses.replace(target, options={"file_stem": name, **target.options})


def target_inputs(target: Target) -> dict[str, Any]:
    """Return what of a target an artifact depends on."""
    options = dict(target.options)
    return {"target": {"converter": target.converter, "precision": target.precision, "options": options}}
