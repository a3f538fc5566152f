"""A job with an output folder: the stages, each made once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mka_export.errors import UsageError
from mka_export.heal.stage import LOSSES, heal_need, heal_stage
from mka_export.inputs import CALIBRATION_WINDOW, SELF
from mka_export.merge.choose import Settings
from mka_export.merge.needs import merge_need
from mka_export.merge.plan import Plan, read_plan
from mka_export.merge.stage import PLAN, SIMILARITY, merge_stage
from mka_export.models.activations import calibration_need
from mka_export.models.checkpoint import Checkpoint, read_json
from mka_export.models.expected import expected_outline, fetch_need
from mka_export.models.outline import Outline
from mka_export.models.prefixed import pass_bytes
from mka_export.models.sampling import sampling_bytes
from mka_export.models.sources import cache_folder
from mka_export.needs import Need
from mka_export.options import AUTO, DeviceOptions, HealOptions, MergeOptions, MmluOptions, OutputOptions, TextOptions
from mka_export.parity.comparison import HEALED, MERGED, QUANTIZED, measure, measuring_bytes
from mka_export.parity.verdict import judge
from mka_export.pipeline.asking import MMLU
from mka_export.pipeline.depth import AutoRatio
from mka_export.pipeline.forecast import Forecast, left_to_do
from mka_export.pipeline.job import CALIBRATION, DEPTH, NO_QUESTIONS, PARITY, SAMPLED, Job, made_with, show, stem
from mka_export.pipeline.making import Making, named, target_inputs
from mka_export.pipeline.measured import FACTS
from mka_export.pipeline.requests import heal_settings, merge_settings
from mka_export.publish import write_json
from mka_export.report import CARDS, write_cards, write_reports
from mka_export.target import Limits, Target, load_converter
from mka_export.workspace import RECORD, Workspace


class Export(Job):
    """A job with an output folder: merge and convert, stage by stage.

    Use as a context manager: the folder is locked, and the model fetched, inside.

    Args:
        merge: how the model will be merged first; None where it is converted as it is.
        targets: what to make.
        suffix: of the output folder's name, after the model's, where ``--out`` is not given.
        attribute: whether the artifacts' weights are measured in torch too.

    Raises:
        UsageError: besides what ``Job`` checks, a stage would replace the model, a target is not for its family.
        ConversionError, UnsupportedError: a converter cannot make a target from this model.
    """

    def __init__(
        self,
        model: str,
        merge: MergeOptions | None,
        heal: HealOptions,
        targets: Sequence[Target],
        texts: TextOptions,
        device: DeviceOptions,
        output: OutputOptions,
        suffix: str,
        questions: MmluOptions = NO_QUESTIONS,
        *,
        attribute: bool = False,
    ) -> None:
        super().__init__(model, texts, device, output, f"{stem(model)}-{suffix}", questions)
        self.planned, self.healing, self.targets = merge, heal, targets
        if heal.heal != "none":
            self.longest = max(self.longest, heal.heal_tokens)
        self.lineage: dict[str, Checkpoint] = {}  # what was made from the original, in order
        self.auto = AutoRatio(self, merge, targets) if merge and merge.ratio == AUTO else None
        made = [DEPTH, MERGED, HEALED] if merge else [CALIBRATION]
        self.spare_the_model(SAMPLED, *made, PARITY, QUANTIZED, MMLU, CARDS, *(target.name for target in targets))
        self._making, self._attribute = Making(self, attribute=attribute), attribute
        self._merge_report: dict[str, Any] | None = None
        self._heal_report: dict[str, Any] | None = None

    def __enter__(self) -> Export:
        with ExitStack() as stack:
            self.workspace = stack.enter_context(Workspace(self.out, self.progress))
            self.open()
            self._check_targets()
            self._check_room()
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._exit.__exit__(*error)

    def _check_targets(self) -> None:
        for target in self.targets:
            target.require_family(self.original.architecture.name)
            load_converter(target.converter).check(self.original, target)

    def _check_room(self) -> None:
        forecast = self._forecast(Outline.of_checkpoint(self.original), self.original.path, Need())
        forecast.require_disk()
        if shortfall := forecast.memory_shortfall:
            self.progress.say(f"the job may need {shortfall}: it may become slow, or fail")

    def forecast(self) -> dict[str, Any]:
        """Return what the job will take, for JSON; the model need not be there, and is not fetched.

        Raises:
            SourceError, CheckpointError, UnsupportedError: the model cannot be had, or read.
            UsageError: the ratio or the plan does not fit the model.
        """
        model = expected_outline(self.source)
        found = self._forecast(model, *fetch_need(self.source, model, cache_folder())).to_dict()
        source = {"name": self.source.name, "kind": self.source.kind, "id": self.source.id}
        return {"source": source, **found}

    def _forecast(self, model: Outline, cache: Path, fetch: Need) -> Forecast:
        stages: dict[str, Need] = {}
        known: dict[str, dict[str, Any]] = {}
        method, layers, tokens = None, model.num_layers, self.texts.calibration_tokens
        searches = self.auto is not None and self.auto.searches
        calibrated = self.planned is not None or any(t.activations or t.calibration for t in self.targets)
        if calibrated and self.texts.calibration == SELF:
            ids, text = 8 * self.longest, 8 * self.longest  # bytes: int64 each, and more than a token's text takes
            stages[SAMPLED] = Need(kept=ids + text, memory=sampling_bytes(model, min(CALIBRATION_WINDOW, tokens)))
        if self.planned is not None:
            deepest = self._settings(self.planned, model.architecture.name, layers)
            settings = self._least(deepest, model)
            method, most = settings.method, (deepest if searches else settings).remove
            need = merge_need(model, most, method, tokens, CALIBRATION_WINDOW)
            if searches and not (self.out / MERGED / RECORD).is_file():  # else it is over; what is tried is not kept
                stages[DEPTH] = Need(scratch=need.kept + need.scratch, memory=need.memory)
            layers -= settings.remove
            known[MERGED] = {**made_with(), **({} if searches else _merge_inputs(settings))}
            stages[MERGED] = dataclasses.replace(need, kept=model.with_layers(layers).nbytes)
        elif any(target.activations for target in self.targets):
            stages[CALIBRATION], known[CALIBRATION] = calibration_need(model, tokens), made_with()
        shallow = model.with_layers(layers)
        if self.healing.heal != "none":
            count = max(1, self.healing.heal_tokens // CALIBRATION_WINDOW)
            stages[HEALED] = heal_need(model, shallow, count, CALIBRATION_WINDOW)
            known[HEALED] = {**made_with(), "healing": dataclasses.asdict(heal_settings(self.healing))}
        if self.planned is not None and not self.targets:
            stages[f"{PARITY}/{[*stages][-1]}"] = Need(memory=self._measuring_bytes(model, 0))
        for target in self.targets:
            needs = self._needs(target, model, shallow)
            if not searches:
                target.require_budget(needs[target.name])
                file = named(target, self.source.name, None if self.planned is None else layers)
                known[target.name] = {**made_with(*target.packages), **target_inputs(file)}
            stages |= needs
        if self.asking.wanted:
            largest = max(need.kept for need in stages.values()) if stages else 0
            stages[MMLU] = Need(memory=max(pass_bytes(model), largest))
        if searches:  # where one layer less goes after all, what was made is replaced
            again = sum(stages[name].kept for name in (MERGED, *(target.name for target in self.targets)))
            stages[MERGED] = dataclasses.replace(stages[MERGED], scratch=stages[MERGED].scratch + again)
        left = left_to_do(self.out, stages, known, first=(SAMPLED, MERGED, HEALED))
        return Forecast(model, layers, searches, method, cache, fetch, self.out, left)

    def _least(self, settings: Settings | Plan, model: Outline) -> Settings | Plan:
        """Return what is merged at least; ``settings`` are for the most where a limit decides."""
        if self.auto is None or isinstance(settings, Plan):
            return settings
        return dataclasses.replace(settings, remove=self.auto.least(model))

    def _needs(self, target: Target, model: Outline, shallow: Outline) -> dict[str, Need]:
        """Return the stages of a target, and what each takes."""
        converter = load_converter(target.converter)
        made = converter.need(shallow, target)
        needs = {target.name: made, f"{PARITY}/{target.name}": Need(memory=self._measuring_bytes(model, made.kept))}
        if self._attribute:
            unpacked = converter.unpacked_bytes(shallow, target)
            needs[f"{QUANTIZED}/{target.name}"] = Need(scratch=unpacked, memory=self._measuring_bytes(shallow, 0))
            if self.asking.wanted:
                needs[f"{MMLU}/{QUANTIZED}/{target.name}"] = Need(scratch=unpacked)
        return needs

    def _measuring_bytes(self, model: Outline, artifact: int) -> int:
        """Return the memory that measuring takes, beside an artifact of so many bytes."""
        return measuring_bytes(model, artifact, self.texts.windows, self.texts.window_tokens)

    def merge(self) -> Checkpoint:
        """Publish the merged checkpoint, with its plan, heat map and activations.

        Raises:
            UsageError: the ratio or the plan does not fit the model.
        """
        assert self.planned is not None
        settings = self._settings(self.planned, self.original.architecture.name, self.original.num_layers)
        inputs = {
            **self.inputs(self.original),
            "calibration": self.calibration.sha256,
            **_merge_inputs(settings),
        }

        def make(folder: Path, pieces: Path) -> None:
            windows = self.calibration
            merge_stage(self.runner, windows.ids, windows.describe(), settings, folder, pieces, self.progress)

        stage = self.workspace.stage(MERGED, inputs, make)
        plan, similarity = read_json(stage.path / PLAN), read_json(stage.path / SIMILARITY)
        self._merge_report = {
            "method": plan["method"],
            "measure": plan["measure"],
            "ratio": 1 - len(plan["layers"]) / self.original.num_layers,
            "schedule": plan["schedule"],
            "protect": plan["protect"],
            "layers": plan["layers"],
            "layers_before": self.original.num_layers,
            "layers_after": len(plan["layers"]),
            "similarity": {key: similarity[key] for key in ("before", "after")},
            "steps": plan["steps"],
            "calibration": plan["calibration"],
            "seconds": stage.seconds,
            "depth": self.auto.depth.to_dict() if self.auto and self.auto.depth else None,
            "plan": None if self.planned.plan is None else str(self.planned.plan),
        }
        self.lineage = {MERGED: Checkpoint.open(stage.path)}
        return self.lineage[MERGED]

    def heal(self) -> Checkpoint | None:
        """Publish the merged checkpoint trained on the original's answers, with its losses; None if it is not asked for.

        Raises:
            MkaError: the machine has too little memory, or the training fails.
        """
        if self.healing.heal == "none":
            return None
        assert self._merge_report is not None
        merged, windows, spans = (
            self.lineage[MERGED],
            self.windows(self.healing.heal_tokens),
            self._merge_report["layers"],
        )
        healing = heal_settings(self.healing)
        inputs = {
            **self.inputs(merged),
            "original": self.original.fingerprint,
            "calibration": windows.sha256,
            "healing": dataclasses.asdict(healing),
        }

        def make(folder: Path, pieces: Path) -> None:
            need = heal_need(Outline.of_checkpoint(self.original), Outline.of_checkpoint(merged), *windows.ids.shape)
            self.require_memory(need.memory, "distilling holds the whole merged model, and", "Leave out --heal.")
            heal_stage(
                self.runner, merged, spans, windows.ids, windows.describe(), healing, folder, pieces, self.progress
            )

        stage = self.workspace.stage(HEALED, inputs, make)
        self._heal_report = {**read_json(stage.path / LOSSES), "seconds": stage.seconds}
        self.lineage[HEALED] = Checkpoint.open(stage.path)
        return self.lineage[HEALED]

    def judge(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Measure the checkpoint that was made, in torch, against the original; returns the fields of a verdict."""
        name = [*self.lineage][-1]
        inputs = {
            **self.inputs(checkpoint),
            "original": self.original.fingerprint,
            **self.evaluation_inputs(),
            "device": self.device.device,
        }

        def make(folder: Path, pieces: Path) -> None:
            figures = measure(
                self.runtime(checkpoint),
                self.reference,
                None,
                self.evaluation.ids,
                bytes_per_token=self.evaluation.bytes_per_token,
                progress=self.progress,
            )
            write_json(folder / FACTS, judge(figures, Limits(), Limits()).to_dict())

        return read_json(self.workspace.stage(f"{PARITY}/{name}", inputs, make).path / FACTS)

    def describe(self, checkpoint: Checkpoint, lost: dict[str, Any]) -> dict[str, Any]:
        """Return what is said of a checkpoint that is all that was made, for JSON; ``lost`` is what ``judge`` returned."""
        return {"path": str(checkpoint.path), "merge": self._merge_report, "heal": self._heal_report, "parity": lost}

    def _settings(self, options: MergeOptions, family: str, layers: int) -> Settings | Plan:
        if options.plan is None:
            return self.auto.merge() if self.auto and self.auto.depth else merge_settings(options, layers)
        plan = read_plan(options.plan)
        if (plan.model["architecture"], plan.model["layers"]) != (family, layers):
            raise UsageError(
                f"{options.plan} is for {plan.model['architecture']} with {plan.model['layers']} layers, "
                f"{self.source.name} is {family} with {layers}",
                "Give a plan made for this model.",
            )
        return plan

    def make(self) -> list[dict[str, Any]]:
        """Make and measure every target; returns their entries in the report."""
        return [self._making.entry(target, self.lineage) for target in self.targets]

    def finish(self, targets: list[dict[str, Any]]) -> int:
        """Write reports, cards and manifest, print the report; returns the exit code."""
        report = self.report(self._merge_report, self._heal_report, targets, self.workspace.stages)
        if self.auto and self.auto.stepped_back:
            report["warnings"].append(
                "One layer less goes because an artifact broke the limit on the windows of the verdict: on these it is a "
                "little too good."
            )
        report = write_reports(report, self.workspace.path)
        write_cards(report, self.workspace.path, self.licence.files)
        self.write_manifest()
        return show(report, as_json=self.output.json)

    def write_manifest(self) -> None:
        """Record what was made from what."""
        self.workspace.write_manifest(self.about())


def _merge_inputs(settings: Settings | Plan) -> dict[str, Any]:
    """Return what of its settings a merge depends on."""
    return {"merge": settings.to_dict() if isinstance(settings, Plan) else dataclasses.asdict(settings)}
