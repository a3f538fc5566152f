"""One command's work: a model, its texts, the report."""

from __future__ import annotations

import resource
import sys
from dataclasses import asdict, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from mka_export.errors import MkaError, UsageError
from mka_export.inputs import CALIBRATION_WINDOW, CHARACTERS, SELF, Windows, read_texts, require_disjoint, windows_of
from mka_export.models.checkpoint import Checkpoint
from mka_export.models.dataset import dataset_text
from mka_export.models.device import pick_device
from mka_export.models.outline import Outline
from mka_export.models.runner import LayerRunner
from mka_export.models.sampling import sample_windows, sampling_bytes
from mka_export.models.sources import cache_folder, fetch, resolve
from mka_export.models.text import Text, sample_prompts
from mka_export.models.tokenizer import leading_id, load_tokenizer, ordinary_ids, require_rows, text_ids
from mka_export.needs import size
from mka_export.options import DeviceOptions, MmluOptions, OutputOptions, Shard, TextOptions
from mka_export.parity.comparison import ORIGINAL
from mka_export.parity.runtimes.torch_runtime import TorchRuntime
from mka_export.parity.verdict import EXIT_CODES, worst
from mka_export.pipeline.asking import Asking
from mka_export.pipeline.forecast import BASE_BYTES, free_memory
from mka_export.progress import Progress
from mka_export.publish import save_array
from mka_export.report import print_json, print_report
from mka_export.workspace import Stage, Workspace, check_ours

SAMPLED, CALIBRATION, DEPTH, PARITY = "sampled", "calibration", "depth", "parity"  # stages, besides the checkpoints'
EVAL = "eval"  # a folder of them
SAMPLED_IDS, SAMPLED_TEXT = "ids.npy", "text.txt"
# Whose versions every stage depends on.
COMMON_PACKAGES = ("mka-export", "torch", "transformers", "tokenizers", "numpy", "scipy", "scikit-learn")
PACKAGES = (
    *(*COMMON_PACKAGES, "gguf", "llama-cpp-python", "jinja2"),
    *("onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-genai"),
)


NO_QUESTIONS = MmluOptions()


class Job:
    """One command's work: a model, its texts, and where results go.

    Making one checks everything that can be checked before anything is fetched or loaded.

    Args:
        default_out: output folder where ``--out`` is not given.
        questions: which of MMLU the models are asked.
        shard: which part of the evaluation is measured here; None for all.

    Attributes:
        asking: these.
        workspace: the output folder, once it is locked, of a job that has one.

    Raises:
        UsageError: an option, or a combination of options, cannot be.
        WorkspaceError: the output folder is someone else's.
    """

    workspace: Workspace

    def __init__(
        self,
        model: str,
        texts: TextOptions,
        device: DeviceOptions,
        output: OutputOptions,
        default_out: str,
        questions: MmluOptions = NO_QUESTIONS,
        shard: Shard | None = None,
    ) -> None:
        self.source = resolve(model, revision=output.revision)
        self.texts, self.device, self.output = texts, device, output
        self.progress = Progress(quiet=output.quiet)
        pick_device(device.device)
        self.out = output.out or Path(default_out)
        model_folder = Path(self.source.id).resolve() if self.source.kind in ("directory", "gguf") else None
        if model_folder is not None and model_folder in (self.out.resolve(), *self.out.resolve().parents):
            raise UsageError(
                f"--out {self.out} is inside the model {model}, which is never written to", "Choose another --out."
            )
        check_ours(self.out)
        if shard is not None and texts.windows < shard.count:
            raise UsageError(f"--shard {shard}: there are only {texts.windows} windows", "Give more --windows.")
        self.shard = shard
        self._text = read_texts(texts)
        self.asking = Asking(self, questions)
        self.longest = texts.calibration_tokens  # of the calibration text that any stage wants

    def open(self) -> None:
        """Fetch the model and cut the token windows.

        Raises:
            SourceError, CheckpointError, UnsupportedError: the model cannot be had, or read.
            MkaError: a text is too short.
        """
        self.progress.say(f"{self.source.name}: {self.source.kind} {self.source.id}")
        fetched = fetch(self.source, cache_folder(), self.progress)
        self.provenance, self.licence = fetched.provenance, fetched.licence
        self.original = Checkpoint.open(fetched.path)
        self.runner = LayerRunner(self.original, self.device.device, ORIGINAL)
        tokenizer = load_tokenizer(fetched.path)
        require_rows(tokenizer, self.original)
        first = leading_id(tokenizer)
        self.leading = [] if first is None else [first]
        self.prompts = [self.leading + text_ids(tokenizer, p) for p in sample_prompts()]
        self.tokenizer = tokenizer
        self.evaluation = self.evaluation_windows(self.texts.windows)

    @property
    def measured_ids(self) -> NDArray[np.int64]:
        """The evaluation windows that are measured here: (windows, tokens)."""
        return self.evaluation.ids[self.own]

    @property
    def own(self) -> slice:
        """Which windows, and which of whatever else is shared out, are this job's."""
        return self.shard.own if self.shard else slice(None)

    def evaluation_windows(self, count: int) -> Windows:
        """Cut so many windows, evenly spread, from the evaluation text.

        Raises:
            MkaError: it is too short.
        """
        return windows_of(self._text.evaluation, self.tokenizer, count, self.texts.window_tokens)

    @property
    def evaluation_text(self) -> str:
        """The text that the evaluation windows are cut from."""
        return self._text.evaluation.text

    def about_evaluation(self) -> dict[str, Any]:
        """Return what a model is judged by, all shards together; ``tokens`` are those that are predicted."""
        windows, tokens = self.evaluation.ids.shape
        return {
            "text": self.evaluation.source,
            "sha256": self.evaluation.sha256,
            "windows": windows,
            "window_tokens": tokens,
            "tokens": windows * (tokens - 1),
        }

    def spare_the_model(self, *stages: str) -> None:
        """Check that publishing stages will not replace the folder that the model comes from.

        Raises:
            UsageError: one would.
        """
        if self.source.kind in ("directory", "gguf"):
            self.spare(Path(self.source.id), f"the model {self.source.name}", *stages)

    def spare(self, path: Path, what: str, *stages: str) -> None:
        """Check that publishing stages will not replace a folder that holds something else.

        Args:
            path: where that is.
            what: it is, in words.

        Raises:
            UsageError: one would.
        """
        for stage in stages:
            folder = (self.out / stage).resolve()
            if folder in (path, *path.parents):
                raise UsageError(f"{folder} would be replaced, and holds {what}", "Choose another --out.")

    def about(self) -> dict[str, Any]:
        """Return what was worked on, and with what, for the manifest."""
        return {"model": self.source.name, "source": dict(self.provenance), "tool": versions(*PACKAGES)}

    def inputs(self, checkpoint: Checkpoint, *packages: str) -> dict[str, Any]:
        """Return what a stage made from a checkpoint depends on; ``packages``: besides those of every stage."""
        return {"model": checkpoint.fingerprint, **made_with(*packages)}

    def evaluation_inputs(self) -> dict[str, Any]:
        """Return what a measurement on the evaluation windows depends on, besides the model and the device."""
        shard = {"shard": str(self.shard)} if self.shard else {}
        return {"evaluation": [self._text.evaluation.sha256, self.evaluation.sha256], **shard}

    @cached_property
    def calibration(self) -> Windows:
        """The calibration windows; what is raised is said at ``windows``."""
        return self.windows(self.texts.calibration_tokens)

    def windows(self, budget: int) -> Windows:
        """Return windows of the calibration text, of so many tokens together at most.

        Raises:
            UsageError: they share text with the evaluation.
            MkaError: they cannot be had.
        """
        where, tokens = self.texts.calibration, min(CALIBRATION_WINDOW, budget)
        if where == SELF:
            return self._sampled(budget // tokens, tokens)
        if self._text.calibration is None:
            self.progress.say(f"reading the dataset {where}")
            text = dataset_text(str(where), CHARACTERS * self.longest)
            require_disjoint(text, self._text.evaluation)
            self._text = replace(self._text, calibration=text)
        assert self._text.calibration is not None
        return windows_of(self._text.calibration, self.tokenizer, None, tokens, budget)

    def require_memory(self, nbytes: int, what: str, remedy: str) -> None:
        """Say what ``what`` needs of memory.

        Raises:
            MkaError: the machine has not as much.
        """
        need, free = BASE_BYTES + nbytes, free_memory()
        if need > free:
            raise MkaError(f"{what} needs {size(need)} of memory, where {size(free)} are free", remedy)
        self.progress.say(f"{what} may need {size(need)} of memory")

    def _sampled(self, count: int, tokens: int) -> Windows:
        """Return windows sampled from the original model: a stage of its own, as long as any stage wants it."""
        most = max(count, self.longest // tokens)
        leading, first = leading_id(self.tokenizer), ordinary_ids(self.tokenizer)

        def make(folder: Path, pieces: Path) -> None:
            need = sampling_bytes(Outline.of_checkpoint(self.original), tokens)
            self.require_memory(need, "sampling text holds the whole model, and", "Give a text with --calibration.")
            path, device = self.original.path, self.runner.device
            made = sample_windows(path, leading, first, most, tokens, device, self.progress)
            save_array(folder / SAMPLED_IDS, made.numpy())
            text = "\n\n".join(self.tokenizer.batch_decode(made, skip_special_tokens=True))
            (folder / SAMPLED_TEXT).write_text(text, encoding="utf-8")

        inputs = {**self.inputs(self.original), "windows": [most, tokens]}
        stage = self.workspace.stage(SAMPLED, inputs, make)
        text = Text(SELF, (stage.path / SAMPLED_TEXT).read_text(encoding="utf-8"))
        require_disjoint(text, self._text.evaluation)
        return Windows(np.load(stage.path / SAMPLED_IDS)[:count], SELF, len(text.text.encode()) / (most * tokens))

    @cached_property
    def reference(self) -> TorchRuntime:
        """The original model in torch."""
        return self.runtime(self.original)

    def runtime(self, checkpoint: Checkpoint) -> TorchRuntime:
        """Return a checkpoint in torch."""
        name = ORIGINAL if checkpoint is self.original else None  # its folder in a cache is called by a hash
        return TorchRuntime(checkpoint.path, device=self.device.device, progress=self.progress, model=name)

    def report(
        self,
        merge: dict[str, Any] | None,
        heal: dict[str, Any] | None,
        targets: list[dict[str, Any]],
        stages: list[Stage],
    ) -> dict[str, Any]:
        """Return the whole report, as its schema has it."""
        peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return {
            "format": "mka-export/report",
            "version": 1,
            "tool": versions(*PACKAGES),
            "model": {
                "name": self.source.name,
                "source": dict(self.provenance),
                "layers": self.original.num_layers,
                "parameters": self.original.parameters,
                "nbytes": self.original.nbytes,
                "licence": self.licence.to_dict(),
            },
            "merge": merge,
            "heal": heal,
            "evaluation": self.about_evaluation(),
            "mmlu": self.asking.describe(),
            "shard": asdict(self.shard) if self.shard else None,
            "targets": targets,
            "stages": [{"name": s.name, "seconds": s.seconds, "reused": s.reused} for s in stages],
            "peak_memory_bytes": peak * (1 if sys.platform == "darwin" else 1024),
            "warnings": [],
        }


def show(report: dict[str, Any], *, as_json: bool) -> int:
    """Print a report on stdout, as a table or as JSON; returns the exit code."""
    if as_json:
        print_json(report)
    else:
        print_report(report, Console())
    if any(t["artifact"] is None for t in report["targets"]):
        return 1
    return EXIT_CODES[worst(t["verdict"] for t in report["targets"])]


def stem(model: str) -> str:
    """Return what files made from ``model`` are called: its name without folders and suffix."""
    return Path(model.rstrip("/")).stem if model.lower().endswith(".gguf") else model.rstrip("/").rpartition("/")[2]


def made_with(*packages: str) -> dict[str, Any]:
    """Return what every stage depends on of what is installed; ``packages``: besides those of every stage."""
    return {"versions": versions(*COMMON_PACKAGES, *packages)}


def versions(*packages: str) -> dict[str, str]:
    """Return the installed version of each package."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a checkout on the path, not installed
            found[package] = "not installed"
    return found
