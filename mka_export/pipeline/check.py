"""Check: artifacts of anybody's making, measured against a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from mka_export.errors import UsageError
from mka_export.hashes import file_sha256, files_in
from mka_export.models.checkpoint import Checkpoint
from mka_export.options import CheckOptions, DeviceOptions, LimitOptions, MmluOptions, OutputOptions, TextOptions
from mka_export.parity.comparison import MERGED
from mka_export.parity.runtimes import ONNX_CONFIG
from mka_export.pipeline.configured import Plan, Wanted, read_config
from mka_export.pipeline.job import PARITY, Job, show
from mka_export.pipeline.measuring import Measuring, Subject
from mka_export.pipeline.requests import given_limits
from mka_export.report import write_reports
from mka_export.target import Artifact, Limits, Target
from mka_export.workspace import Workspace

DEFAULT_LIMITS = Limits(max_ppl_ratio=1.35)  # of an artifact that comes without a target


@dataclasses.dataclass(frozen=True)
class Found:
    """An artifact on this machine.

    Attributes:
        name: of its entry in the report.
        path: the file or folder.
        runtime: the runtime for its format.
        files: name beside ``path`` -> file.
    """

    name: str
    path: Path
    runtime: str
    files: Mapping[str, Path]


def check(
    artifact: Path | None,
    against: str | None,
    checked: CheckOptions,
    texts: TextOptions,
    mmlu: MmluOptions,
    limits: LimitOptions,
    device: DeviceOptions,
    output: OutputOptions,
) -> int:
    """Measure GGUF files or ONNX folders, whoever made them, against a model; returns the exit code."""
    if checked.config is not None:
        if artifact is not None or against is not None:
            raise UsageError("--config names the artifacts and the model", "Leave out ARTIFACT and --against.")
        plan = read_config(checked.config, texts, mmlu)
    elif artifact is None or against is None:
        raise UsageError("no artifact, or nothing to check it against", "Give ARTIFACT and --against, or --config.")
    else:
        plan = Plan("", against, [Wanted(artifact)], texts, mmlu)
    found = [(wanted, find(wanted)) for wanted in plan.artifacts]
    _require_distinct([each.name for _, each in found])
    name = plan.name or found[0][1].name
    job = Job(plan.model, plan.texts, device, output, f"{name}-check", plan.mmlu, checked.shard)
    for wanted, each in found:
        stage = f"{PARITY}/{each.name}"
        job.spare_the_model(stage)
        job.spare(wanted.path.resolve(), f"the artifact {wanted.path}", stage)
    with Workspace(job.out, job.progress) as job.workspace:
        job.open()
        measuring = Measuring(job)
        entries = [measuring.entry(_subject(wanted, each, limits, job)) for wanted, each in found]
        report = write_reports(job.report(None, None, entries, job.workspace.stages), job.workspace.path)
        job.workspace.write_manifest(job.about())
        return show(report, as_json=output.json)


def find(wanted: Wanted) -> Found:
    """Look at an artifact, which is not opened.

    Raises:
        UsageError: it is none.
    """
    path = wanted.path
    there = path.resolve()  # . has no name
    name = wanted.name or there.stem.lstrip(".") or "artifact"  # a stage's; hidden ones are for work in progress
    if there.is_file() and there.suffix.lower() == ".gguf":
        return Found(name, path, "llama.cpp", {path.name: path})
    if (there / ONNX_CONFIG).is_file():
        files = {f"{there.name}/{inside}": file for inside, file in files_in(there).items()}
        return Found(name, there, "onnxruntime", files)
    raise UsageError(f"{path} is no .gguf file and no ONNX folder", "Give the artifact to check.")


def _require_distinct(names: list[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"several artifacts are called {', '.join(twice)}", "Give them names of their own.")


def _subject(wanted: Wanted, found: Found, limits: LimitOptions, job: Job) -> Subject:
    """Return an artifact to be measured; its files are hashed."""
    conversion = dataclasses.replace(wanted.conversion, **given_limits(limits, "conversion_"))
    compression = dataclasses.replace(wanted.compression or DEFAULT_LIMITS, **given_limits(limits, ""))
    target = Target(found.name, "", "", "", found.runtime, conversion, compression)
    artifact = Artifact(found.path, tuple(found.files), sum(path.stat().st_size for path in found.files.values()))
    hashes = {name: file_sha256(path) for name, path in found.files.items()}
    lineage = None
    if wanted.checkpoint is not None:
        checkpoint = Checkpoint.open(wanted.checkpoint)
        lineage = {} if checkpoint.fingerprint == job.original.fingerprint else {MERGED: checkpoint}
    return Subject(target, artifact, hashes, lineage)
