"""The harness's tasks: found, fingerprinted, run."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from mka_export.errors import MkaError, UsageError
from mka_export.parity.harness.model import RuntimeLM

NO_FILTER = "none"  # the harness's word for a metric of the model's own answers
LISTING = "'lm-eval ls tasks' lists them; --include FOLDER adds your own."


@dataclass(frozen=True)
class Loaded:
    """A task, or the tasks of a group, with their data.

    Attributes:
        name: as it was asked for.
        tasks: what the harness evaluates.
        sha256: of what a result depends on: settings, documents, and those that examples are taken from.
    """

    name: str
    tasks: Mapping[str, Any]
    sha256: str


class Tasks:
    """The tasks of the harness, and those in a folder.

    Args:
        names: what is asked for; a group of tasks is one.
        include: a folder with task files. They may name Python functions, which are then run.
        shots: examples before each question; None for as many as a task says. As in the harness's own command, a task
            that says 0 stays at 0.
        limit: documents of each task; None for all.
        quiet: say nothing on stderr.

    Raises:
        UsageError: a name is unknown, or the folder is none.
    """

    def __init__(
        self, names: Sequence[str], include: Path | None, shots: int | None, limit: int | None, *, quiet: bool
    ) -> None:
        self._shots, self._limit, self._quiet = shots, limit, quiet
        if include is not None and not include.is_dir():
            raise UsageError(f"--include {include} is no folder", "Give the folder with the task files.")
        self._folder = include and str(include)
        with self._said_in_a_line("its tasks"):
            # Reading all of the harness's 14 000 files takes seconds, which tasks in a folder can do without.
            self._manager = TaskManager(include_path=self._folder, include_defaults=False)
            if not set(names) <= set(self._manager.all_tasks):
                self._manager = TaskManager(include_path=self._folder)
        for name in names:
            if name not in self._manager.all_tasks:
                near = get_close_matches(name, self._manager.all_tasks, n=1)
                hint = f"Did you mean {near[0]}? " if near else ""
                raise UsageError(f"lm-evaluation-harness has no task {name!r}", hint + LISTING)

    def load(self, name: str) -> Loaded:
        """Load a task or a group, with its data.

        Raises:
            MkaError: it cannot be loaded.
        """
        digest = hashlib.sha256()
        with self._said_in_a_line(f"task {name}"):
            try:
                found = self._manager.load([name])
            except KeyError:  # a group in the folder whose tasks are not
                self._manager = TaskManager(include_path=self._folder)
                found = self._manager.load([name])
            for each, task in sorted(found["tasks"].items()):
                own = task.get_config("num_fewshot")
                task.set_config("num_fewshot", (own or 0) if self._shots is None or own == 0 else self._shots)
                task.set_fewshot_seed(DEFAULT_OTHER_SEED)
                examples = list(task.fewshot_docs() or ()) if task.get_config("num_fewshot") else []
                about = [each, task.dump_config(), list(islice(task.eval_docs, self._limit)), examples]
                digest.update(json.dumps(about, sort_keys=True, default=_name).encode())
        return Loaded(name, found, digest.hexdigest())

    def run(self, loaded: Loaded, model: RuntimeLM) -> dict[str, Any]:
        """Evaluate a model.

        Returns:
            ``tasks``: name -> version, shots, sha256 of each document, and metrics: name -> value, standard error (None
            where the harness has none), whether more is better, and, of a metric that is 0 or 1 for every document, these
            as ``answers``; ``groups``: name -> metrics without answers.

        Raises:
            MkaError: a task fails, or the runtime does.
        """
        with self._said_in_a_line(f"task {loaded.name}"):
            found = evaluate(model, loaded.tasks, limit=self._limit)
        groups = found.get("groups", {})
        return {
            "tasks": {name: _task(found, name) for name in loaded.tasks["tasks"]},
            "groups": {name: _metrics(results, found, name) for name, results in groups.items()},
        }

    @contextmanager
    def _said_in_a_line(self, what: str) -> Iterator[None]:
        """Turn whatever the harness raises into one line, and keep stdout for results."""
        with ExitStack() as stack:
            said = stack.enter_context(redirect_stderr(StringIO())) if self._quiet else sys.stderr
            stack.enter_context(redirect_stdout(said))
            try:
                yield
            except MkaError:
                raise
            except Exception as error:  # of the harness, the data sets' library, or a task's own functions
                raise MkaError(
                    f"lm-evaluation-harness: {what}: {type(error).__name__}: {error}",
                    "A machine without a hub needs task files that read local data: --include FOLDER."
                    if isinstance(error, OSError)
                    else "",
                ) from error


def _task(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    samples = found["samples"][name]
    answers: dict[str, list[int]] = {}
    for key in found["results"][name]:
        metric, _, name_of_filter = key.partition(",")
        values = [each[metric] for each in samples if each["filter"] == name_of_filter and metric in each]
        if values and all(isinstance(value, int | float) and value in (0, 1) for value in values):
            answers[key] = [int(value) for value in values]
    metrics = _metrics(found["results"][name], found, name)
    for key, values in answers.items():
        metrics[_shown(key)]["answers"] = values
    first = samples[0]["filter"]
    return {
        "version": found["versions"][name],
        "shots": found["n-shot"][name],
        "documents": [each["doc_hash"] for each in samples if each["filter"] == first],
        "metrics": metrics,
    }


def _metrics(results: Mapping[str, Any], found: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
    better = found["higher_is_better"].get(name, {})
    metrics = {}
    for key, value in results.items():
        metric, comma, name_of_filter = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            error = results.get(f"{metric}_stderr,{name_of_filter}")
            metrics[_shown(key)] = {
                "value": value,
                "stderr": error if isinstance(error, float) else None,
                "higher_is_better": better.get(metric),
            }
    return metrics


def _shown(key: str) -> str:
    """Return a metric's name with its filter's, where there is one."""
    return key.removesuffix(f",{NO_FILTER}")


def _name(value: object) -> str:
    """Return a name for what JSON has none for: the same on every run, as an address is not."""
    return str(getattr(value, "__qualname__", type(value).__qualname__))
