"""MMLU on every model of a job, each in its runtime: the same questions, asked once and kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mka_export.errors import RuntimeFailure
from mka_export.models.checkpoint import Checkpoint, read_json
from mka_export.models.tokenizer import text_ids
from mka_export.options import MmluOptions
from mka_export.parity.comparison import ORIGINAL
from mka_export.parity.metrics import ARTIFACT
from mka_export.parity.mmlu.answers import ask
from mka_export.parity.mmlu.figures import Answers, Asked
from mka_export.parity.mmlu.prompts import Sheet, make_sheet
from mka_export.parity.mmlu.questions import HUB, Subject, load_subjects, prompts_sha256, sample
from mka_export.parity.runtimes import Runtime
from mka_export.parity.tokenizer_check import first_difference
from mka_export.target import Target
from mka_export.workspace import write_json

if TYPE_CHECKING:
    from mka_export.pipeline.job import Job

MMLU, TARGETS = "mmlu", "targets"  # a stage for each model: mmlu/original, mmlu/targets/gguf-q4
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
        return sample(load_subjects(self._options.mmlu), self._options.mmlu_questions, self._options.mmlu_seed)

    @cached_property
    def sheet(self) -> Sheet:
        """The prompts.

        Raises:
            UsageError, UnsupportedError: they are not for this model.
        """
        job = self._job
        context = int(job.original.config["max_position_embeddings"])
        return make_sheet(
            self._subjects, self._options.mmlu_shots, lambda t: text_ids(job.tokenizer, t), job.leading, context
        )

    def describe(self) -> dict[str, Any] | None:
        """Return the field ``mmlu`` of the report."""
        if not self.wanted:
            return None
        prompts = self.sheet.prompts
        return {
            "source": self._options.mmlu,
            "sha256": self.sha256,
            "questions": len(prompts),
            "subjects": len({prompt.subject for prompt in prompts}),
            "shots": self._options.mmlu_shots,
            "seed": self._options.mmlu_seed,
        }

    @property
    def _texts(self) -> list[str]:
        return [prompt.text for prompt in self.sheet.prompts]

    @cached_property
    def sha256(self) -> str:
        """The sha256 of the prompts."""
        return prompts_sha256(self._texts)

    def ask(
        self, target: Target, open_artifact: Open, files: Mapping[str, str], lineage: Mapping[str, Checkpoint] | None
    ) -> Asked:
        """Ask an artifact and the models it comes from, each once for all targets.

        Args:
            open_artifact: opens it in the target's runtime.
            files: sha256 of its files.
            lineage: name -> the checkpoints between the original and it, in order, as far as they are known.

        Raises:
            RuntimeFailure: the artifact's runtime fails, or the artifact lacks a token.
        """
        answers = [self.original(), *(self.checkpoint(name, each) for name, each in (lineage or {}).items())]
        inputs = {"artifact": dict(files), "runtime": target.runtime, "devices": asdict(self._job.device)}
        answers.append(self._answers(ARTIFACT, f"{TARGETS}/{target.name}", inputs, open_artifact))
        prompts = self.sheet.prompts
        return Asked(tuple(p.subject for p in prompts), tuple(p.answer for p in prompts), tuple(answers))

    def chosen(self, runtime: Runtime) -> list[int]:
        """Return what a model answers, 0 to 3, without keeping it."""
        letters = np.concatenate(list(runtime.next_log_probs(self.sheet.groups(), self.sheet.letters)))
        return [int(answer) for answer in letters.argmax(axis=1)]

    def original(self) -> Answers:
        """Ask the original, in torch."""
        return self.checkpoint(ORIGINAL, self._job.original)

    def checkpoint(self, name: str, checkpoint: Checkpoint) -> Answers:
        """Ask a checkpoint, in torch."""
        inputs = {"checkpoint": checkpoint.fingerprint, "device": self._job.device.device}
        return self._answers(name, name, inputs, lambda: self._job.runtime(checkpoint))

    def _answers(self, name: str, stage: str, inputs: Mapping[str, Any], opened: Open) -> Answers:
        job, sheet = self._job, self.sheet

        def make(folder: Path, pieces: Path) -> None:
            with closing(opened()) as runtime:
                if name == ARTIFACT and (other := first_difference(job.reference, runtime, self._texts)):
                    raise RuntimeFailure(str(other))
                np.save(folder / LETTERS, ask(runtime, sheet, pieces, job.progress))
                write_json(folder / FACTS, {"runtime": runtime.name, "device": runtime.device})

        about = {**job.inputs(job.original), "questions": self.sha256, "letters": list(sheet.letters)}
        path = job.workspace.stage(f"{MMLU}/{stage}", {**about, **inputs}, make).path
        facts = read_json(path / FACTS)
        return Answers(name, facts["runtime"], facts["device"], np.load(path / LETTERS, allow_pickle=False))
