"""The stages in order: source, merge, convert, measure, report. The only place that knows all of them."""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
from collections.abc import Mapping
from contextlib import ExitStack, closing
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mka_export.errors import ConversionError, RuntimeFailure, UnsupportedError, UsageError, unknown_name
from mka_export.inputs import CALIBRATION_WINDOW, Windows, read_texts, windows_of
from mka_export.merge.fuse import METHODS
from mka_export.merge.plan import Plan, read_plan
from mka_export.merge.stage import ACTIVATIONS, PLAN, Settings, layers_to_remove, merge_stage
from mka_export.models.activations import Activations, calibrate
from mka_export.models.checkpoint import Checkpoint, read_json, write_json
from mka_export.models.runner import LayerRunner, pick_device
from mka_export.models.sources import cache_folder, fetch, resolve
from mka_export.models.text import sample_prompts, tokenizer_corpus, tokenizer_oddities
from mka_export.models.tokenizer import leading_id, load_tokenizer
from mka_export.options import ConvertOptions, DeviceOptions, LimitOptions, MergeOptions, OutputOptions, TextOptions
from mka_export.parity.comparison import measure
from mka_export.parity.runtimes import Runtime, open_runtime
from mka_export.parity.runtimes.torch_runtime import TorchRuntime
from mka_export.parity.tokenizer_check import first_difference
from mka_export.parity.verdict import EXIT_CODES, judge, worst
from mka_export.progress import Progress
from mka_export.report import print_report, write_report
from mka_export.target import Artifact, Limits, Target, load_converter, load_target
from mka_export.workspace import Stage, Workspace, check_ours, file_sha256

MERGED, CALIBRATION, PARITY = "merged", "calibration", "parity"  # stage folders, besides one for each target
ARTIFACT, RESULT, REPORT = "artifact.json", "parity.json", "report.json"
SAMPLE_TOKENS = 16
DEFAULT_MAX_PPL_RATIO = 1.35  # of an artifact that comes without a target
PACKAGES = ("mka-export", "torch", "transformers", "tokenizers", "gguf", "llama-cpp-python", "numpy", "scikit-learn")


class Job:
    """One command's work: a model, its texts, and where results go.

    Making one checks everything that can be checked before anything is fetched or loaded.

    Args:
        default_out: output folder where ``--out`` is not given.

    Raises:
        UsageError: an option, or a combination of options, cannot be.
        WorkspaceError: the output folder is someone else's.
    """

    def __init__(
        self, model: str, texts: TextOptions, device: DeviceOptions, output: OutputOptions, default_out: str | None
    ) -> None:
        self.source = resolve(model, revision=output.revision)
        self.texts, self.device, self.output = texts, device, output
        self.progress = Progress(quiet=output.quiet)
        pick_device(device.device)
        out = output.out or (Path(default_out) if default_out else None)
        if out is not None:
            model_folder = Path(self.source.id).resolve() if self.source.kind in ("directory", "gguf") else None
            if model_folder is not None and model_folder in (out.resolve(), *out.resolve().parents):
                raise UsageError(
                    f"--out {out} is inside the model {model}, which is never written to", "Choose another --out."
                )
            check_ours(out)
        self.out = out
        self._text = read_texts(texts)

    def open(self) -> None:
        """Fetch the model and cut the token windows.

        Raises:
            SourceError, CheckpointError, UnsupportedError: the model cannot be had, or read.
            MkaError: a text is too short.
        """
        self.progress.say(f"{self.source.name}: {self.source.kind} {self.source.id}")
        fetched = fetch(self.source, cache_folder(), self.progress)
        self.provenance = fetched.provenance
        self.original = Checkpoint.open(fetched.path)
        tokenizer = load_tokenizer(fetched.path)
        leading = leading_id(tokenizer)
        self.evaluation = windows_of(self._text.evaluation, tokenizer, self.texts.windows, self.texts.window_tokens)
        self.prompts = [
            ([] if leading is None else [leading]) + tokenizer.encode(p, add_special_tokens=False)
            for p in sample_prompts()
        ]
        self._tokenizer = tokenizer

    @cached_property
    def calibration(self) -> Windows:
        """The calibration windows."""
        tokens = min(CALIBRATION_WINDOW, self.texts.calibration_tokens)
        return windows_of(self._text.calibration, self._tokenizer, None, tokens, self.texts.calibration_tokens)

    @cached_property
    def reference(self) -> TorchRuntime:
        """The original model in torch."""
        return TorchRuntime(self.original.path, device=self.device.device, progress=self.progress)

    @cached_property
    def reference_samples(self) -> list[str]:
        """The original's continuations of the sample prompts."""
        return _continuations(self.reference, self.prompts)

    def runtime_options(self, name: str) -> dict[str, Any]:
        """Return what ``open_runtime`` is told about devices."""
        return {"gpu_layers": self.device.gpu_layers} if name == "llama.cpp" else {"device": self.device.device}

    def measure(
        self, artifact: Artifact, checkpoint: Checkpoint | None, target: Target, files: Mapping[str, str]
    ) -> dict[str, Any]:
        """Measure an artifact and judge it: the report's entry for its target.

        Args:
            checkpoint: what it was made from; None if that is not known.
            files: sha256 of its files, by path.
        """
        entry: dict[str, Any] = {
            "name": target.name,
            "artifact": self._describe(artifact, files),
            "runtime": {"name": target.runtime, "device": "", "versions": _versions("llama-cpp-python")},
            "tokenizer": None,
            "samples": [],
        }
        failures: list[str] = []
        corpus = [*tokenizer_corpus(), self._text.evaluation.text]
        limits = (target.conversion, target.compression)
        merged = self._checkpoint_runtime(checkpoint)
        try:
            with closing(
                open_runtime(target.runtime, artifact.path, **self.runtime_options(target.runtime))
            ) as runtime:
                entry["runtime"]["device"] = runtime.device
                difference = first_difference(self.reference, runtime, corpus)
                entry["tokenizer"] = {
                    "identical": difference is None,
                    "texts": len(corpus),
                    "first_difference": difference and str(difference),
                }
                if difference is not None:
                    failures.append(str(difference))
                odd = first_difference(self.reference, runtime, tokenizer_oddities())
                oddities = [f"unusual text: {odd}"] if odd and difference is None else []
                comparison = measure(
                    runtime,
                    self.reference,
                    merged,
                    self.evaluation.ids,
                    bytes_per_token=self.evaluation.bytes_per_token,
                    progress=self.progress,
                )
                continuations = _continuations(runtime, self.prompts)
        except RuntimeFailure as error:
            return {**entry, **judge(None, *limits, failures=[*failures, str(error)]).to_dict()}
        entry["samples"] = [
            {"prompt": p, "original": o, "artifact": a}
            for p, o, a in zip(sample_prompts(), self.reference_samples, continuations, strict=True)
        ]
        entry |= judge(comparison, *limits, failures=failures).to_dict()
        entry["warnings"] = [*artifact.details.get("warnings", []), *oddities, *entry["warnings"]]
        return entry

    def _checkpoint_runtime(self, checkpoint: Checkpoint | None) -> Runtime | None:
        if checkpoint is None:
            return None
        if checkpoint is self.original:
            return self.reference
        return TorchRuntime(checkpoint.path, device=self.device.device, progress=self.progress)

    def _describe(self, artifact: Artifact, files: Mapping[str, str]) -> dict[str, Any]:
        folder = artifact.path.parent
        return {
            "path": str(artifact.path),
            "files": [{"path": n, "sha256": files[n], "nbytes": (folder / n).stat().st_size} for n in artifact.files],
            "nbytes": artifact.nbytes,
            "share_of_original": artifact.nbytes / self.original.nbytes,
            "details": dict(artifact.details),
        }

    def report(
        self, merge: dict[str, Any] | None, targets: list[dict[str, Any]], stages: list[Stage]
    ) -> dict[str, Any]:
        """Return the whole report, as its schema has it."""
        ids = self.evaluation.ids
        peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return {
            "format": "mka-export/report",
            "version": 1,
            "tool": _versions(*PACKAGES),
            "model": {
                "name": self.source.name,
                "source": dict(self.provenance),
                "layers": self.original.num_layers,
                "parameters": self.original.parameters,
                "nbytes": self.original.nbytes,
            },
            "merge": merge,
            "evaluation": {
                "text": self.evaluation.source,
                "sha256": self.evaluation.sha256,
                "windows": ids.shape[0],
                "window_tokens": ids.shape[1],
                "tokens": ids.shape[0] * (ids.shape[1] - 1),
            },
            "targets": targets,
            "stages": [{"name": s.name, "seconds": s.seconds, "reused": s.reused} for s in stages],
            "peak_memory_bytes": peak * (1 if sys.platform == "darwin" else 1024),
            "warnings": [],
        }

    def show(self, report: dict[str, Any]) -> int:
        """Print a report on stdout, as a table or as JSON; returns the exit code."""
        if self.output.json:
            print(json.dumps(report, indent=2, ensure_ascii=False))
        else:
            print_report(report, Console())
        if any(t["artifact"] is None for t in report["targets"]):
            return 1
        return EXIT_CODES[worst(t["verdict"] for t in report["targets"])]


class Export(Job):
    """A job with an output folder: merge and convert, stage by stage.

    Use as a context manager: the folder is locked, and the model fetched, inside.
    """

    def __init__(
        self, model: str, texts: TextOptions, device: DeviceOptions, output: OutputOptions, suffix: str
    ) -> None:
        super().__init__(model, texts, device, output, f"{_stem(model)}-{suffix}")

    def __enter__(self) -> Export:
        assert self.out is not None
        with ExitStack() as stack:
            self.workspace = stack.enter_context(Workspace(self.out, self.progress))
            self.open()
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._exit.__exit__(*error)

    def merge(self, options: MergeOptions) -> Checkpoint:
        """Publish the merged checkpoint, with its plan, heat map and activations.

        Raises:
            UsageError: the ratio or the plan does not fit the model.
        """
        settings = self._settings(options)
        inputs = {
            **self._inputs(self.original),
            "calibration": self.calibration.sha256,
            "merge": settings.to_dict() if isinstance(settings, Plan) else dataclasses.asdict(settings),
        }

        def make(folder: Path) -> None:
            runner = LayerRunner(self.original, self.device.device)
            merge_stage(runner, self.calibration.ids, self.calibration.describe(), settings, folder, self.progress)

        stage = self.workspace.stage(MERGED, inputs, make)
        plan = read_json(stage.path / PLAN)
        self._merge_report = {
            "method": plan["method"],
            "measure": plan["measure"],
            "ratio": len(plan["steps"]) / self.original.num_layers,
            "schedule": plan["schedule"],
            "protect": plan["protect"],
            "layers": plan["layers"],
            "layers_before": self.original.num_layers,
            "layers_after": len(plan["layers"]),
            "steps": plan["steps"],
            "calibration": plan["calibration"],
            "seconds": stage.seconds,
        }
        return Checkpoint.open(stage.path)

    def _settings(self, options: MergeOptions) -> Settings | Plan:
        layers = self.original.num_layers
        if options.plan is None:
            assert options.ratio is not None
            remove = layers_to_remove(options.ratio, layers, options.protect)
            return Settings(remove, options.method, options.schedule, options.protect, options.alpha)
        plan = read_plan(options.plan)
        family = self.original.architecture.name
        if (plan.model["architecture"], plan.model["layers"]) != (family, layers):
            raise UsageError(
                f"{options.plan} is for {plan.model['architecture']} with {plan.model['layers']} layers, "
                f"{self.source.name} is {family} with {layers}",
                "Give a plan made for this model.",
            )
        return plan

    def export(self, checkpoint: Checkpoint, target: Target) -> dict[str, Any]:
        """Publish the artifact for a target, measure it, and return the report's entry for it."""
        if target.families and checkpoint.architecture.name not in target.families:
            raise UnsupportedError(
                f"target {target.name} is for {', '.join(target.families)}, not {checkpoint.architecture.name}"
            )
        merged = checkpoint is not self.original
        stem = _stem(self.source.name) + (f"-{checkpoint.num_layers}L" if merged else "")
        target = dataclasses.replace(target, options={"file_stem": stem, **target.options})
        activations = self._activations(checkpoint) if target.activations else None
        inputs = {
            **self._inputs(checkpoint),
            "target": {"converter": target.converter, "precision": target.precision, "options": dict(target.options)},
            "activations": activations and [activations.calibration, activations.tokens],
        }

        def make(folder: Path) -> None:
            convert = load_converter(target.converter)
            made = convert(checkpoint, target, folder, activations=activations, progress=self.progress)
            fields = {"path": made.path.name, "files": made.files, "nbytes": made.nbytes, "details": made.details}
            write_json(folder / ARTIFACT, fields)

        try:
            stage = self.workspace.stage(target.name, inputs, make)
        except ConversionError as error:
            self.progress.say(f"{target.name}: {error}")
            runtime = {"name": target.runtime, "device": "", "versions": {}}
            failed = judge(None, target.conversion, target.compression, failures=[str(error)]).to_dict()
            return {
                "name": target.name,
                "artifact": None,
                "runtime": runtime,
                "tokenizer": None,
                "samples": [],
                **failed,
            }
        made = read_json(stage.path / ARTIFACT)
        artifact = Artifact(stage.path / made["path"], tuple(made["files"]), made["nbytes"], made["details"])
        return self._measured(artifact, checkpoint, target, stage)

    def _measured(self, artifact: Artifact, checkpoint: Checkpoint, target: Target, made: Stage) -> dict[str, Any]:
        inputs = {
            **self._inputs(checkpoint),
            "artifact": dict(made.files),
            "original": self.original.fingerprint,
            "evaluation": [self._text.evaluation.sha256, self.evaluation.sha256],
            "limits": [dataclasses.asdict(target.conversion), dataclasses.asdict(target.compression)],
            "devices": dataclasses.asdict(self.device),
        }

        def make(folder: Path) -> None:
            write_json(folder / RESULT, self.measure(artifact, checkpoint, target, made.files))

        return read_json(self.workspace.stage(f"{PARITY}/{target.name}", inputs, make).path / RESULT)

    def _activations(self, checkpoint: Checkpoint) -> Activations:
        if checkpoint is not self.original:
            return Activations.load(checkpoint.path / ACTIVATIONS)

        def make(folder: Path) -> None:
            runner = LayerRunner(checkpoint, self.device.device)
            ids = torch.from_numpy(self.calibration.ids)
            calibrate(runner, ids, self.calibration.sha256, self.progress).save(folder / ACTIVATIONS)

        inputs = {**self._inputs(checkpoint), "calibration": self.calibration.sha256}
        return Activations.load(self.workspace.stage(CALIBRATION, inputs, make).path / ACTIVATIONS)

    def _inputs(self, checkpoint: Checkpoint) -> dict[str, Any]:
        return {"model": checkpoint.fingerprint, "versions": _versions(*PACKAGES)}

    def finish(self, targets: list[dict[str, Any]], *, merged: bool) -> int:
        """Write report and manifest, print the report, and return the exit code."""
        report = self.report(self._merge_report if merged else None, targets, self.workspace.stages)
        self.write_manifest()
        write_report(report, self.workspace.path / REPORT)
        return self.show(read_json(self.workspace.path / REPORT))

    def write_manifest(self) -> None:
        """Record what was made from what."""
        self.workspace.write_manifest(
            {"model": self.source.name, "source": dict(self.provenance), "tool": _versions(*PACKAGES)}
        )


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
    with Export(model, texts, device, output, "mka") as export:
        merged = export.merge(merge)
        return export.finish([export.export(merged, target) for target in targets], merged=True)


def merge_only(
    model: str, texts: TextOptions, merge: MergeOptions, device: DeviceOptions, output: OutputOptions
) -> Path:
    """Merge a model and stop there; returns the folder of the merged checkpoint."""
    check_merge(merge)
    with Export(model, texts, device, output, "mka") as export:
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
    with Export(model, texts, device, output, "export") as export:
        return export.finish([export.export(export.original, target) for target in targets], merged=False)


def check(
    artifact: Path, against: str, texts: TextOptions, limits: LimitOptions, device: DeviceOptions, output: OutputOptions
) -> int:
    """Measure any GGUF file, whoever made it, against a model; returns the exit code."""
    if not artifact.is_file() or artifact.suffix.lower() != ".gguf":
        raise UsageError(f"{artifact} is no .gguf file", "Give the artifact to check.")
    job = Job(against, texts, device, dataclasses.replace(output, out=None), None)
    job.open()
    compression = dataclasses.replace(Limits(max_ppl_ratio=DEFAULT_MAX_PPL_RATIO), **given_limits(limits, ""))
    target = Target(artifact.stem, "", "", "", "llama.cpp", Limits(), compression)
    made = Artifact(artifact, (artifact.name,), artifact.stat().st_size)
    report = job.report(None, [job.measure(made, None, target, {artifact.name: file_sha256(artifact)})], [])
    if output.out is not None:
        output.out.mkdir(parents=True, exist_ok=True)
        write_report(report, output.out / REPORT)
    return job.show(report)


def check_merge(options: MergeOptions) -> None:
    """Check what can be checked of a merge before the model is there.

    Raises:
        UsageError: options are missing, unknown, or contradict each other.
    """
    if (options.ratio is None) == (options.plan is None):
        raise UsageError("give either --ratio or --plan", "For example --ratio 0.2.")
    if options.ratio is not None:
        layers_to_remove(options.ratio, 10**6, 0)
    if options.plan is not None:
        read_plan(options.plan)
    if options.method not in METHODS:
        raise UsageError(unknown_name("--method", options.method, METHODS))
    if options.alpha is not None and options.method != "mka-paper":
        raise UsageError(f"--alpha is for --method mka-paper; {options.method} does not average", "Leave it out.")


def load_targets(convert: ConvertOptions, limits: LimitOptions) -> list[Target]:
    """Return the targets asked for, with the limits and options of the command line.

    Raises:
        UsageError: none is named, one is unknown, or one is named twice.
    """
    if not convert.to:
        raise UsageError("no --to", "Say what to make, for example --to gguf-q4; 'mka-export targets' lists them.")
    targets = []
    for name in convert.to:
        target = load_target(name)
        load_converter(target.converter)
        options = dict(target.options)
        if convert.max_fallback is not None:
            options["max_fallback"] = convert.max_fallback
        targets.append(
            dataclasses.replace(
                target,
                options=options,
                activations=target.activations and convert.imatrix == "auto",
                conversion=dataclasses.replace(target.conversion, **given_limits(limits, "conversion_")),
                compression=dataclasses.replace(target.compression, **given_limits(limits, "")),
            )
        )
    names = [target.name for target in targets]
    if len(set(names)) < len(names):
        raise UsageError(f"--to names a target twice: {', '.join(names)}")
    if clash := {MERGED, CALIBRATION, PARITY} & set(names):
        raise UsageError(f"a target cannot be called {clash.pop()}", "Rename its file.")
    return targets


def given_limits(limits: LimitOptions, prefix: str) -> dict[str, float]:
    """Return the limits set on the command line, by their names in ``Limits``."""
    values = {f.name: getattr(limits, prefix + f.name) for f in dataclasses.fields(Limits)}
    return {name: value for name, value in values.items() if value is not None}


def _continuations(runtime: Runtime, prompts: list[list[int]]) -> list[str]:
    return [runtime.detokenize(ids) for ids in runtime.generate(prompts, SAMPLE_TOKENS)]


def _stem(model: str) -> str:
    return Path(model.rstrip("/")).stem if model.lower().endswith(".gguf") else model.rstrip("/").rpartition("/")[2]


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a checkout on the path, not installed
            found[package] = "unknown"
    return found
