"""Evaluation: the tasks of lm-evaluation-harness on artifacts, in their runtimes, and on the model they came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from rich.console import Console

from mka_export.data import load_json
from mka_export.errors import MkaError, RuntimeFailure, UsageError
from mka_export.hashes import file_sha256
from mka_export.models.checkpoint import Checkpoint, read_json
from mka_export.models.sources import Source, cache_folder, fetch, resolve
from mka_export.options import DeviceOptions, EvalOptions, OutputOptions
from mka_export.parity.comparison import ORIGINAL
from mka_export.parity.harness import PACKAGES, require_harness
from mka_export.parity.harness.frame import Frame
from mka_export.parity.harness.paired import paired
from mka_export.parity.metrics import ARTIFACT
from mka_export.parity.runtimes import ONNX_CONFIG, RUNTIME_PACKAGES, Runtime, open_runtime
from mka_export.pipeline.check import find
from mka_export.pipeline.configured import Wanted
from mka_export.pipeline.job import EVAL, PARITY, versions
from mka_export.pipeline.measured import FACTS
from mka_export.pipeline.measuring import runtime_options
from mka_export.progress import Progress
from mka_export.publish import write_atomically, write_json
from mka_export.report import print_evaluation, print_json, with_nulls
from mka_export.workspace import MANIFEST, RECORD, Workspace, check_ours

if TYPE_CHECKING:
    from mka_export.parity.harness.tasks import Loaded

FORMAT = "mka-export/evaluation"
RESULT, EVALUATION = "result.json", "evaluation.json"
NO_MODEL = "none"  # --against


@dataclass(frozen=True)
class Subject:
    """A model that is evaluated.

    Attributes:
        name: in the results, and of its folder.
        runtime: what runs it.
        path: where it is.
        made_of: what tells its bytes: sha256 by file, or a checkpoint's fingerprint.
    """

    name: str
    runtime: str
    path: Path
    made_of: Any


def evaluate(path: Path, chosen: EvalOptions, device: DeviceOptions, output: OutputOptions) -> int:
    """Run tasks of the harness on the artifacts of an output folder, or on one; prints a table or JSON.

    Returns:
        the exit code: 1 where a runtime could not run its artifact, else 0.

    Raises:
        UsageError: no artifact, no task, or the harness is not installed.
        MkaError: a task, its data or the original cannot be had.
    """
    return Evaluation(path, chosen, device, output).carry_out()


class Evaluation:
    """One command's work; arguments and errors are those of ``evaluate``."""

    def __init__(self, path: Path, chosen: EvalOptions, device: DeviceOptions, output: OutputOptions) -> None:
        require_harness()
        self._names = list(dict.fromkeys(name.strip() for name in chosen.tasks.split(",") if name.strip()))
        if not self._names:
            raise UsageError("--tasks names none", "For example --tasks piqa,hellaswag.")
        self._path, self._chosen, self._device, self._output = path, chosen, device, output
        self._progress = Progress(quiet=output.quiet)
        self._ours = (path / MANIFEST).is_file()
        self._artifacts = list(_made_in(path)) if self._ours else [_alone(path)]
        if not self._artifacts:
            raise UsageError(f"{path} holds no artifact", "Make one there: mka-export convert MODEL --to gguf-q4.")
        self._out = output.out or (path if self._ours else Path(f"{self._artifacts[0].name}-eval"))
        check_ours(self._out)
        self._source = self._original_source()

    def carry_out(self) -> int:
        """Do all of it; returns the exit code."""
        from mka_export.parity.harness.tasks import Tasks  # imports the harness

        chosen = self._chosen
        self._tasks = Tasks(self._names, chosen.include, chosen.shots, chosen.limit, quiet=self._output.quiet)
        with Workspace(self._out, self._progress) as self._workspace:
            self._loaded = [self._tasks.load(name) for name in self._names]
            subjects = [*([self._original] if self._original else []), *self._artifacts]
            found = self._summary([self._evaluated(subject) for subject in subjects])
            write_atomically(self._workspace.path / EVALUATION, found)
            self._workspace.write_manifest(_about(self._workspace.path))
        if self._output.json:
            print_json(found)
        else:
            print_evaluation(found, Console())
        return 1 if any(model["error"] for model in found["models"]) else 0

    def _original_source(self) -> Source | None:
        """Return where the original comes from: as asked for, or as the output folder has it; None without."""
        if self._chosen.against is not None:
            wanted = self._chosen.against
            return None if wanted == NO_MODEL else resolve(wanted, revision=self._output.revision)
        match _about(self._path) if self._ours else {}:
            case {"model": str(name), "source": {"kind": str(kind), "id": str(place), **more}}:
                revision = str(more["revision"]) if kind == "hub" else None
                return resolve(name if kind == "wheel" else place, revision=revision)
        return None

    @cached_property
    def _original(self) -> Subject | None:
        if self._source is None:
            return None
        path = fetch(self._source, cache_folder(), self._progress).path
        return Subject(ORIGINAL, "torch", path, Checkpoint.open(path).fingerprint)

    def _evaluated(self, subject: Subject) -> dict[str, Any]:
        """Return what a model reached on every task; a task that it was evaluated on is not run again."""
        about = {"name": subject.runtime, "device": "", "versions": versions(*RUNTIME_PACKAGES[subject.runtime])}
        entry: dict[str, Any] = {"name": subject.name, "runtime": about, "error": None, "tasks": {}, "groups": {}}
        with ExitStack() as stack:

            @cache
            def runtime() -> Runtime:
                options = runtime_options(subject.runtime, self._device)
                return stack.enter_context(closing(open_runtime(subject.runtime, subject.path, **options)))

            try:
                frame = Frame.of((self._original or subject).path)  # of the original: the same prompts for all
                for task in self._loaded:
                    found = read_json(self._stage(subject, frame, task, runtime) / RESULT)
                    about["device"] = found["device"]
                    entry["tasks"] |= found["tasks"]
                    entry["groups"] |= found["groups"]
            except RuntimeFailure as error:
                self._progress.say(f"{subject.name}: {error}")
                entry["error"] = str(error)
        return entry

    def _stage(self, subject: Subject, frame: Frame, task: Loaded, runtime: Callable[[], Runtime]) -> Path:
        inputs = {
            "model": subject.made_of,
            "frame": asdict(frame),
            "task": task.sha256,
            "limit": self._chosen.limit,
            "runtime": subject.runtime,
            "devices": asdict(self._device),
            "versions": versions("mka-export", *PACKAGES, *RUNTIME_PACKAGES[subject.runtime]),
        }

        def make(folder: Path, pieces: Path) -> None:
            from mka_export.parity.harness.model import RuntimeLM  # imports the harness

            self._progress.say(f"{subject.name}: {task.name}")
            model = RuntimeLM(runtime(), frame, pieces, self._progress)
            found = self._tasks.run(task, model)
            write_json(folder / RESULT, with_nulls({"device": runtime().device, "tokens": model.tokens, **found}))

        return self._workspace.stage(f"{EVAL}/{subject.name}/{quote(task.name, safe='')}", inputs, make).path

    def _summary(self, models: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return all figures, as they stand in the file; what each document got is in the stages."""
        differences = []
        if self._original:
            differences = [each for model in models[1:] for each in _differences(models[0]["tasks"], model)]
        for task in (task for model in models for task in model["tasks"].values()):
            task["documents"] = len(task["documents"])
            for metric in task["metrics"].values():
                metric.pop("answers", None)
        chosen = self._chosen
        return {
            "format": FORMAT,
            "version": 1,
            "tool": versions("mka-export", *PACKAGES),
            "settings": {"tasks": self._names, "shots": chosen.shots, "limit": chosen.limit},
            "models": list(models),
            "differences": differences,
        }


def _differences(original: Mapping[str, Any], model: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name, task in model["tasks"].items():
        for metric, figures in task["metrics"].items():
            before = original.get(name, {"metrics": {}})["metrics"].get(metric, {})
            if "answers" in before and "answers" in figures:
                found = asdict(paired(before["answers"], figures["answers"]))
                yield {"model": model["name"], "task": name, "metric": metric, **found}


def _made_in(folder: Path) -> Iterator[Subject]:
    """Yield the artifacts of an output folder, each in the runtime that it was measured in, if it was."""
    for record in sorted(folder.glob(f"[!.]*/{RECORD}")):
        stage, measured = record.parent, folder / PARITY / record.parent.name / FACTS
        for path in sorted(stage.iterdir()):
            if path.suffix.lower() == ".gguf" or (path / ONNX_CONFIG).is_file():
                subject = replace(_artifact(path), name=stage.name)
                if measured.is_file():
                    subject = replace(subject, runtime=read_json(measured)["runtime"]["name"])
                yield subject


def _alone(path: Path) -> Subject:
    found = _artifact(path)
    return replace(found, name=ARTIFACT) if found.name == ORIGINAL else found


def _artifact(path: Path) -> Subject:
    found = find(Wanted(path))
    return Subject(found.name, found.runtime, path, {name: file_sha256(file) for name, file in found.files.items()})


def _about(folder: Path) -> dict[str, Any]:
    """Return what an output folder's manifest says, but for its files."""
    try:
        manifest = load_json(folder / MANIFEST)
    except (OSError, ValueError) as error:
        raise MkaError(f"{folder / MANIFEST} cannot be read: {error}", "Make the folder anew.") from error
    return {key: value for key, value in manifest.items() if key not in ("format", "files")}
