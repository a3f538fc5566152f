"""MMLU on every model of a job, each in its runtime: the same questions, asked once and kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mka_export.errors import RuntimeFailure, UsageError
from mka_export.models.checkpoint import Checkpoint, read_json
from mka_export.models.tokenizer import text_ids
from mka_export.options import MmluOptions
from mka_export.parity.comparison import ORIGINAL, QUANTIZED
from mka_export.parity.metrics import ARTIFACT
from mka_export.parity.mmlu.answers import LogLetters, ask
from mka_export.parity.mmlu.figures import Answers, Asked
from mka_export.parity.mmlu.prompts import Prompt, Sheet, make_sheet
from mka_export.parity.mmlu.questions import HUB, Subject, load_subjects, prompts_sha256, sample
from mka_export.parity.runtimes import RUNTIME_PACKAGES, Runtime
from mka_export.parity.tokenizer_check import first_difference, without_misread
from mka_export.publish import save_array, write_json
from mka_export.target import Target
from mka_export.workspace import Workspace, published

if TYPE_CHECKING:
    from mka_export.pipeline.job import Job

MMLU = "mmlu"  # a stage for each model: mmlu/original, mmlu/merged, mmlu/targets/gguf-q4
LETTERS, FACTS = "letters.npy", "answers.json"

Open = Callable[[], Runtime]


class Asking:
    """The questions of one job, and the answers.

    Args:
        job: whose models are asked; opened before any is.
        options: which questions; none where ``mmlu`` is None.

    Raises:
        UsageError, SourceError: the questions cannot be read.
    """

    def __init__(self, job: Job, options: MmluOptions) -> None:
        self._job, self._options = job, options
        if options.mmlu not in (None, HUB):
            _ = self._subjects  # before anything is fetched

    @property
    def wanted(self) -> bool:
        """Whether any are asked."""
        return self._options.mmlu is not None

    @cached_property
    def _subjects(self) -> list[Subject]:
        assert self._options.mmlu is not None
        subjects = sample(load_subjects(self._options.mmlu), self._options.mmlu_questions, self._options.mmlu_seed)
        if (shard := self._job.shard) is not None and len(subjects) < shard.count:
            raise UsageError(f"--shard {shard}: there are only {len(subjects)} subjects", "Divide the work by fewer.")
        return subjects

    @cached_property
    def _prompts(self) -> Sheet:
        """All prompts, of whatever shard.

        Raises:
            UsageError, UnsupportedError: they are not for this model.
        """
        job = self._job
        context = int(job.original.config["max_position_embeddings"])
        return make_sheet(
            self._subjects, self._options.mmlu_shots, lambda t: text_ids(job.tokenizer, t), job.leading, context
        )

    @cached_property
    def sheet(self) -> Sheet:
        """What is asked here; what is raised is said at ``_prompts``."""
        subjects = [list(group) for _, group in groupby(self._prompts.prompts, key=lambda prompt: prompt.subject)]
        return replace(self._prompts, prompts=tuple(prompt for group in subjects[self._job.own] for prompt in group))

    def describe(self) -> dict[str, Any] | None:
        """Return the field ``mmlu`` of the report: of all shards together."""
        if not self.wanted:
            return None
        return {
            "source": self._options.mmlu,
            "sha256": prompts_sha256(map(_text, self._prompts.prompts)),
            "questions": len(self._prompts.prompts),
            "subjects": len(self._subjects),
            "shots": self._options.mmlu_shots,
            "seed": self._options.mmlu_seed,
        }

    @property
    def inputs(self) -> dict[str, Any] | None:
        """Return what answers depend on, besides the model and where it runs."""
        if not self.wanted:
            return None
        return {"questions": prompts_sha256(map(_text, self.sheet.prompts)), "letters": list(self.sheet.letters)}

    def ask(
        self,
        target: Target,
        open_artifact: Open,
        files: Mapping[str, str],
        lineage: Mapping[str, Checkpoint] | None,
        open_weights: Open | None = None,
    ) -> Asked:
        """Ask an artifact and the models it comes from, each once for all targets.

        Args:
            open_artifact: opens it in the target's runtime.
            files: sha256 of its files.
            lineage: name -> the checkpoints between the original and it, in order, as far as they are known.
            open_weights: opens its weights in torch, where they are asked too.

        Raises:
            RuntimeFailure: the artifact's runtime fails, or the artifact reads the questions as other tokens.
        """
        steps = {ORIGINAL: self._job.original, **(lineage or {})}
        for name, checkpoint in steps.items():
            self._checkpoint(name, checkpoint)
        names = [*steps, ARTIFACT]
        if open_weights is not None:
            names.insert(len(steps), QUANTIZED)
            weights = {"artifact": dict(files), "device": self._job.device.device}
            self._stage(_stage(QUANTIZED, target.name), weights, open_weights, *target.packages)

        def checked() -> Runtime:
            runtime = open_artifact()
            texts, _ = without_misread(runtime.name, map(_text, self.sheet.prompts))
            if other := first_difference(self._job.reference, runtime, texts):
                runtime.close()
                raise RuntimeFailure(str(other))
            return runtime

        inputs = {"artifact": dict(files), "runtime": target.runtime, "devices": asdict(self._job.device)}
        self._stage(_stage(ARTIFACT, target.name), inputs, checked, *RUNTIME_PACKAGES[target.runtime])
        return read_asked(self._job.workspace.path, names, target.name)

    def original(self) -> Asked:
        """Ask the original alone, in torch."""
        self._checkpoint(ORIGINAL, self._job.original)
        return read_asked(self._job.workspace.path, [ORIGINAL], "")

    def letters(self, runtime: Runtime) -> LogLetters:
        """Return what a model answers (questions, 4), without keeping it."""
        return np.concatenate(list(runtime.next_log_probs(self.sheet.groups(), self.sheet.letters)))

    def _checkpoint(self, name: str, checkpoint: Checkpoint) -> None:
        inputs = {"checkpoint": checkpoint.fingerprint, "device": self._job.device.device}
        self._stage(_stage(name, ""), inputs, lambda: self._job.runtime(checkpoint))

    def _stage(self, stage: str, inputs: Mapping[str, Any], opened: Open, *packages: str) -> None:
        job, prompts = self._job, self.sheet.prompts
        numbers = {prompt: number for number, prompt in enumerate(self._prompts.prompts)}

        def make(folder: Path, pieces: Path) -> None:
            with closing(opened()) as runtime:
                letters = ask(runtime, self.sheet, pieces, job.progress)
                asked = Asked(
                    tuple(numbers[prompt] for prompt in prompts),
                    tuple(prompt.subject for prompt in prompts),
                    tuple(prompt.answer for prompt in prompts),
                    (Answers("", runtime.name, runtime.device, letters),),
                )
            _write(asked, 0, folder)

        about = job.inputs(job.original, *packages)
        job.workspace.stage(stage, {**about, **(self.inputs or {}), **inputs}, make, kind=MMLU)


def read_asked(folder: Path, steps: Sequence[str], target: str) -> Asked:
    """Read what was answered from the stages in an output folder.

    Args:
        steps: their names, from the original to the artifact.
        target: whose artifact that is.

    Raises:
        MkaError: a stage is not there as it was made.
    """
    paths = [published(folder, _stage(name, target)).path for name in steps]
    about = [read_json(path / FACTS) for path in paths]
    answers = (
        Answers(name, facts["runtime"], facts["device"], np.load(path / LETTERS, allow_pickle=False))
        for name, path, facts in zip(steps, paths, about, strict=True)
    )
    numbers, subjects, truth = (tuple(about[0][key]) for key in ("numbers", "subjects", "truth"))
    return Asked(numbers, subjects, truth, tuple(answers))


def publish_asked(asked: Asked, workspace: Workspace, target: str, inputs: Mapping[str, Any]) -> None:
    """Publish the stages that ``read_asked`` reads."""
    for i, answers in enumerate(asked.answers):

        def make(folder: Path, pieces: Path, i: int = i) -> None:
            _write(asked, i, folder)

        workspace.stage(_stage(answers.name, target), inputs, make)


def _write(asked: Asked, index: int, folder: Path) -> None:
    answers = asked.answers[index]
    save_array(folder / LETTERS, answers.letters)
    facts = {"runtime": answers.runtime, "device": answers.device}
    write_json(folder / FACTS, {**facts, "numbers": asked.numbers, "subjects": asked.subjects, "truth": asked.truth})


def _stage(step: str, target: str) -> str:
    """Return the name of a step's stage: checkpoints are asked once for all targets."""
    group = {ARTIFACT: f"{MMLU}/targets/{target}", QUANTIZED: f"{MMLU}/{QUANTIZED}/{target}"}
    return group.get(step, f"{MMLU}/{step}")


def _text(prompt: Prompt) -> str:
    return prompt.text
