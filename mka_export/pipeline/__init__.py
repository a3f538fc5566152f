"""The stages in order: source, merge, convert, measure, report. The only place that knows all of them."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path

from mka_export.errors import UsageError
from mka_export.hashes import file_sha256
from mka_export.options import ConvertOptions, DeviceOptions, LimitOptions, MergeOptions, OutputOptions, TextOptions
from mka_export.pipeline.export import REPORT, Export
from mka_export.pipeline.job import Job
from mka_export.pipeline.requests import check_merge, given_limits, load_targets
from mka_export.report import write_report
from mka_export.target import Artifact, Limits, Target
from mka_export.workspace import Workspace

DEFAULT_MAX_PPL_RATIO = 1.35  # of an artifact that comes without a target


def run(
    model: str,
    texts: TextOptions,
    merge: MergeOptions,
    convert: ConvertOptions,
    limits: LimitOptions,
    device: DeviceOptions,
    output: OutputOptions,
) -> int:
    """Merge a model, make every target from it, and measure each against the original; returns the exit code."""
    check_merge(merge)
    targets = load_targets(convert, limits)
    with Export(model, targets, texts, device, output, "mka") as export:
        return export.export(export.merge(merge))


def merge_only(
    model: str, texts: TextOptions, merge: MergeOptions, device: DeviceOptions, output: OutputOptions
) -> Path:
    """Merge a model and stop there; returns the folder of the merged checkpoint."""
    check_merge(merge)
    with Export(model, [], texts, device, output, "mka") as export:
        merged = export.merge(merge)
        export.write_manifest()
        return merged.path


def convert_only(
    model: str,
    texts: TextOptions,
    convert: ConvertOptions,
    limits: LimitOptions,
    device: DeviceOptions,
    output: OutputOptions,
) -> int:
    """Make every target from a model as it is, and measure each against it; returns the exit code."""
    targets = load_targets(convert, limits)
    with Export(model, targets, texts, device, output, "export") as export:
        return export.export(export.original)


def check(
    artifact: Path, against: str, texts: TextOptions, limits: LimitOptions, device: DeviceOptions, output: OutputOptions
) -> int:
    """Measure any GGUF file, whoever made it, against a model; returns the exit code."""
    if not artifact.is_file() or artifact.suffix.lower() != ".gguf":
        raise UsageError(f"{artifact} is no .gguf file", "Give the artifact to check.")
    job = Job(against, texts, device, output, None)
    compression = dataclasses.replace(Limits(max_ppl_ratio=DEFAULT_MAX_PPL_RATIO), **given_limits(limits, ""))
    target = Target(artifact.stem, "", "", "", "llama.cpp", Limits(), compression)
    made = Artifact(artifact, (artifact.name,), artifact.stat().st_size)
    with Workspace(job.out, job.progress) if job.out else nullcontext() as workspace:
        job.open()
        report = job.report(None, [job.measure(made, None, target, {artifact.name: file_sha256(artifact)})], [])
        if workspace:
            write_report(report, workspace.path / REPORT)
            workspace.write_manifest({})
        return job.show(report)
