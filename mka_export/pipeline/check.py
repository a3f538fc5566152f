"""Check: artifacts of anybody's making, measured against a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from mka_export.errors import UsageError
from mka_export.hashes import file_sha256, files_in
from mka_export.options import CheckOptions, DeviceOptions, LimitOptions, MmluOptions, OutputOptions, TextOptions
from mka_export.parity.runtimes import ONNX_CONFIG
from mka_export.pipeline.job import PARITY, Job, show
from mka_export.pipeline.measuring import Measuring, Subject
from mka_export.pipeline.requests import given_limits
from mka_export.report import write_reports
from mka_export.target import Artifact, Limits, Target
from mka_export.workspace import Workspace

DEFAULT_MAX_PPL_RATIO = 1.35  # of an artifact that comes without a target


@dataclasses.dataclass(frozen=True)
class Found:
    """An artifact on this machine.

    Attributes:
        name: of its entry in the report.
        path: the file or folder.
        runtime: the runtime for its format.
        files: name beside ``path`` -> file.
        compression: limits against the original.
    """

    name: str
    path: Path
    runtime: str
    files: Mapping[str, Path]
    compression: Limits

    def subject(self) -> Subject:
        """Return it to be measured; its files are hashed."""
        target = Target(self.name, "", "", "", self.runtime, Limits(), self.compression)
        artifact = Artifact(self.path, tuple(self.files), sum(path.stat().st_size for path in self.files.values()))
        hashes = {name: file_sha256(path) for name, path in self.files.items()}
        return Subject(target, artifact, hashes, None)


def check(
    artifact: Path,
    against: str,
    checked: CheckOptions,
    texts: TextOptions,
    mmlu: MmluOptions,
    limits: LimitOptions,
    device: DeviceOptions,
    output: OutputOptions,
) -> int:
    """Measure any GGUF file or ONNX folder, whoever made it, against a model; returns the exit code."""
    compression = dataclasses.replace(Limits(max_ppl_ratio=DEFAULT_MAX_PPL_RATIO), **given_limits(limits, ""))
    found = find(artifact, compression)
    job = Job(against, texts, device, output, f"{found.name}-check", mmlu, checked.shard)
    stage = f"{PARITY}/{found.name}"
    job.spare_the_model(stage)
    job.spare(artifact.resolve(), f"the artifact {artifact}", stage)
    with Workspace(job.out, job.progress) as job.workspace:
        job.open()
        entry = Measuring(job).entry(found.subject())
        report = write_reports(job.report(None, None, [entry], job.workspace.stages), job.workspace.path)
        job.workspace.write_manifest(job.about())
        return show(report, as_json=output.json)


def find(path: Path, compression: Limits) -> Found:
    """Look at an artifact, which is not opened.

    Raises:
        UsageError: it is none.
    """
    there = path.resolve()  # . has no name
    name = there.stem.lstrip(".") or "artifact"  # a stage's; hidden ones are for work in progress
    if there.is_file() and there.suffix.lower() == ".gguf":
        return Found(name, path, "llama.cpp", {path.name: path}, compression)
    if (there / ONNX_CONFIG).is_file():
        files = {f"{there.name}/{inside}": file for inside, file in files_in(there).items()}
        return Found(name, there, "onnxruntime", files, compression)
    raise UsageError(f"{path} is no .gguf file and no ONNX folder", "Give the artifact to check.")
