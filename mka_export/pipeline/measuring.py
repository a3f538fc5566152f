"""Measuring: artifacts in their runtimes, the models they come from in torch, each once and kept."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mka_export.errors import CheckpointError, RuntimeFailure, UnsupportedError
from mka_export.models.checkpoint import Checkpoint
from mka_export.models.outline import Outline
from mka_export.models.text import sample_conversations, sample_prompts, tokenizer_corpus, tokenizer_oddities
from mka_export.options import DeviceOptions
from mka_export.parity.comparison import ORIGINAL, QUANTIZED, Run
from mka_export.parity.metrics import ARTIFACT, Clock, Scores, score
from mka_export.parity.mmlu.figures import Asked
from mka_export.parity.runtimes import RUNTIME_PACKAGES, Runtime, open_runtime
from mka_export.parity.smoke import check_chat_template, check_ends, smoke
from mka_export.parity.tokenizer_check import first_difference, without_misread
from mka_export.pipeline.asking import Open
from mka_export.pipeline.job import PARITY, Job, versions
from mka_export.pipeline.measured import Measured, empty_facts
from mka_export.publish import publish_folder
from mka_export.target import Artifact, Target, load_converter
from mka_export.workspace import kept_pieces, pieces_folder

SAMPLE_TOKENS = 24
GGUF_RUNTIME = "llama.cpp"


def runtime_options(name: str, device: DeviceOptions) -> dict[str, Any]:
    """Return what ``open_runtime`` is told about devices."""
    return {"gpu_layers": device.gpu_layers} if name == GGUF_RUNTIME else {"device": device.device}


@dataclass(frozen=True)
class Subject:
    """An artifact that is measured.

    Attributes:
        target: what it is to be, and its limits; the stage is ``parity/NAME``.
        artifact: the files.
        files: sha256 of each, by its path.
        lineage: name -> the checkpoints between the original and it, in order; None if they are not known.
        attribute: whether its weights are measured in torch too, to tell what rounding lost from what the runtime does.
    """

    target: Target
    artifact: Artifact
    files: Mapping[str, str]
    lineage: Mapping[str, Checkpoint] | None
    attribute: bool = False


class Measuring:
    """The measurements of one job.

    Args:
        job: opened, with its workspace, before anything is measured.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._originals: list[list[int]] | None = None

    def entry(self, subject: Subject) -> dict[str, Any]:
        """Measure an artifact, unless it was, and judge it: the report's entry for its target."""
        target, artifact = subject.target, subject.artifact
        measured, details = self._measured(subject), dict(artifact.details)
        with self._weights(subject) as weights:
            opened = None
            if subject.attribute:
                quantized = self._quantized(subject, weights)
                measured = measured.with_step(quantized)
                details["bits_per_weight_of_original"] = quantized.facts["bits_per_weight_of_original"]
                opened = weights if quantized.scores else None
            wanted = measured.scores and self._job.asking.wanted
            asked, failures = self._asked(subject, opened) if wanted else (None, [])
        return {
            "name": target.name,
            "artifact": {**self._describe(subject), "details": details},
            "budget": None,
            **measured.judged(target.conversion, target.compression, details.get("warnings", []), asked, failures),
        }

    def _asked(self, subject: Subject, weights: Open | None) -> tuple[Asked | None, list[str]]:
        """Ask an artifact MMLU's questions, and its weights in torch; returns what came of them, or why it fails."""

        def opened() -> Runtime:
            return self._open(subject)

        asking = self._job.asking
        try:
            return asking.ask(subject.target, opened, subject.files, subject.lineage, weights), []
        except RuntimeFailure as error:
            return None, [str(error)]

    def _measured(self, subject: Subject) -> Measured:
        job, lineage = self._job, subject.lineage
        inputs = {
            **job.inputs(job.original, *RUNTIME_PACKAGES[subject.target.runtime], "jinja2"),
            "artifact": dict(subject.files),
            "lineage": None if lineage is None else {name: each.fingerprint for name, each in lineage.items()},
            **job.evaluation_inputs(),
            "runtime": subject.target.runtime,
            "devices": asdict(job.device),
        }

        def make(folder: Path, pieces: Path) -> None:
            self._measure(subject).write(folder)

        stage = job.workspace.stage(f"{PARITY}/{subject.target.name}", inputs, make, kind=PARITY)
        return Measured.read(stage.path)

    def _measure(self, subject: Subject) -> Measured:
        job, name = self._job, subject.target.runtime
        facts = empty_facts(name, versions(*RUNTIME_PACKAGES[name]))
        between = {step: job.runtime(checkpoint) for step, checkpoint in (subject.lineage or {}).items()}
        references = {ORIGINAL: job.reference, **between}
        for reference in references.values():  # before the artifact is in memory too
            reference.run(job.measured_ids)
        try:
            with closing(self._open(subject)) as runtime:
                facts["runtime"]["device"] = runtime.device
                self._compare_tokenizers(runtime, facts)
                scores = score(job.measured_ids, runtime, references, job.progress)
                with Clock() as clock:
                    drafts = runtime.generate(job.prompts, SAMPLE_TOKENS)
                continuations = [runtime.detokenize(ids) for ids in drafts]
                ends = check_ends(job.reference, runtime.ends, job.evaluation.ids[:, 1:])
                chat_template = check_chat_template(job.reference, runtime, sample_conversations())
        except RuntimeFailure as error:
            return Measured({**facts, "failures": [*facts["failures"], str(error)]}, None)
        originals = self._continued(drafts)
        behaves = smoke(chat_template, ends, originals, drafts)
        runs = [Run.of(step, one) for step, one in {**references, ARTIFACT: runtime}.items()]
        facts |= {
            "samples": [
                {"prompt": p, "original": job.reference.detokenize(o), "artifact": a}
                for p, o, a in zip(sample_prompts(), originals, continuations, strict=True)
            ],
            "smoke": behaves.to_dict(),
            "failures": [*facts["failures"], *behaves.failures],
            "speed": {
                "prompt": {"tokens": job.measured_ids.size, "seconds": scores.seconds},
                "generated": {"tokens": sum(map(len, drafts)), "seconds": clock.seconds},
            },
            "steps": [asdict(run) for run in runs],
            "converted": None if subject.lineage is None else [*references][-1],
            "bytes_per_token": job.evaluation.bytes_per_token,
        }
        return Measured(facts, scores)

    @contextmanager
    def _weights(self, subject: Subject) -> Iterator[Open]:
        """Yield what opens the artifact's own weights in torch.

        They are unpacked when it is called, and deleted in the end.
        """
        job = self._job
        final = job.workspace.path / QUANTIZED / f"{subject.target.name}-weights"

        def opened() -> Runtime:
            made_from = [job.original, *(subject.lineage or {}).values()][-1]
            inputs = {**job.inputs(made_from, *subject.target.packages), "artifact": dict(subject.files)}
            unpacked = kept_pieces(final, inputs) / QUANTIZED
            if not unpacked.is_dir():
                with publish_folder(unpacked) as making:
                    converter = load_converter(subject.target.converter)
                    converter.unpack(subject.artifact.path, subject.target, made_from, making, job.progress)
            return job.runtime(Checkpoint.open(unpacked))

        try:
            yield opened
        finally:
            shutil.rmtree(pieces_folder(final), ignore_errors=True)

    def _quantized(self, subject: Subject, weights: Open) -> Measured:
        """Measure the artifact's own weights in torch: step ``quantized``."""
        job = self._job
        inputs = {
            **job.inputs(job.original, *subject.target.packages),
            "artifact": dict(subject.files),
            **job.evaluation_inputs(),
            "device": job.device.device,
        }

        def make(folder: Path, pieces: Path) -> None:
            facts = empty_facts("torch", versions(*RUNTIME_PACKAGES["torch"]))
            facts["bits_per_weight_of_original"] = self._bits_of_original(subject)
            try:
                runtime = weights()
                scores = score(job.measured_ids, runtime, {}, job.progress)
            except (CheckpointError, UnsupportedError) as error:
                why = f"What rounding lost is not told from what the runtime does: {error}"
                Measured({**facts, "failures": [why]}, None).write(folder)
                return
            facts["steps"] = [asdict(Run.of(QUANTIZED, runtime))]
            Measured(facts, Scores({QUANTIZED: scores.nll[ARTIFACT]}, {})).write(folder)

        stage = job.workspace.stage(f"{QUANTIZED}/{subject.target.name}", inputs, make, kind=QUANTIZED)
        return Measured.read(stage.path)

    def _bits_of_original(self, subject: Subject) -> float | None:
        """Return the bits a weight that the target would spend on the original: another mix is not another loss."""
        target = subject.target
        return load_converter(target.converter).bits_per_weight(Outline.of_checkpoint(self._job.original), target)

    def _open(self, subject: Subject) -> Runtime:
        """Open an artifact in its runtime, on the device that was asked for."""
        name = subject.target.runtime
        return open_runtime(name, subject.artifact.path, **runtime_options(name, self._job.device))

    def _compare_tokenizers(self, runtime: Runtime, facts: dict[str, Any]) -> None:
        reference, corpus = self._job.reference, [*tokenizer_corpus(), self._job.evaluation_text]
        texts, misread = without_misread(runtime.name, corpus)
        difference = first_difference(reference, runtime, texts)
        facts["tokenizer"] = {
            "identical": difference is None,
            "texts": len(corpus),
            "first_difference": difference and str(difference),
        }
        if difference is not None:
            facts["failures"] = [str(difference)]
        elif odd := first_difference(reference, runtime, [*misread, *tokenizer_oddities()]):
            facts["oddities"] = [f"{runtime.name} reads some unusual text otherwise: {odd}"]

    def _continued(self, drafts: list[list[int]]) -> list[list[int]]:
        """Return the original's continuations of the sample prompts, found sooner where an artifact's are alike."""
        if self._originals is None:
            self._originals = self._job.reference.generate(self._job.prompts, SAMPLE_TOKENS, drafts)
        return self._originals

    def _describe(self, subject: Subject) -> dict[str, Any]:
        artifact, folder = subject.artifact, subject.artifact.path.parent
        return {
            "path": str(artifact.path),
            "files": [
                {"path": name, "sha256": subject.files[name], "nbytes": (folder / name).stat().st_size}
                for name in artifact.files
            ],
            "nbytes": artifact.nbytes,
            "share_of_original": artifact.nbytes / self._job.original.nbytes,
        }
