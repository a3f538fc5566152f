"""Methods side by side: every method at every ratio, on the same tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mka_export.errors import UsageError, unknown_name
from mka_export.inputs import CALIBRATION_WINDOW
from mka_export.merge.choose import Settings
from mka_export.merge.measures import DEFAULT, MEASURES
from mka_export.merge.methods import METHODS
from mka_export.merge.needs import merge_need
from mka_export.merge.stage import require_share
from mka_export.models.outline import Outline
from mka_export.needs import require_room
from mka_export.options import (
    ITERATIVE,
    ONE_SHOT,
    CompareOptions,
    DeviceOptions,
    MergeOptions,
    MmluOptions,
    OutputOptions,
    TextOptions,
)
from mka_export.parity.comparison import COMPRESSION, MERGED, ORIGINAL
from mka_export.parity.mmlu.figures import Answers, compare_answers
from mka_export.parity.statistics import bootstrap_means, perplexity
from mka_export.pipeline.asking import MMLU
from mka_export.pipeline.job import PACKAGES, SAMPLED, Job, stem, versions
from mka_export.pipeline.requests import check_merge, merge_settings
from mka_export.pipeline.trials import Means, Trial, Trials
from mka_export.publish import write_atomically
from mka_export.report import draw_methods, print_json, print_methods, with_nulls
from mka_export.workspace import Workspace

FORMAT = "mka-export/comparison"
COMPARISON, PICTURES = "comparison.json", ("comparison.png", "comparison.svg")
OURS = "mka"  # which the others are held against


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A method, on a schedule.

    Attributes:
        name: as it is typed and shown.
        method: a name in ``METHODS``.
        schedule: as ``--schedule``.
    """

    name: str
    method: str
    schedule: str


@dataclasses.dataclass(frozen=True)
class Row:
    """A method at a number of layers, and what came of it."""

    name: str
    layers: int
    trial: Trial


ALL = [
    *(Contestant(name, name, ITERATIVE) for name in METHODS),
    Contestant("mka-paper:one-shot", "mka-paper", ONE_SHOT),
]


class Compare(Job):
    """Merge a model by several methods, several ratios each, and measure all in torch.

    The stages are one method at one number of layers each.

    Raises:
        UsageError: besides what ``Job`` checks, a method or a ratio is none.
    """

    def __init__(
        self,
        model: str,
        chosen: CompareOptions,
        texts: TextOptions,
        mmlu: MmluOptions,
        device: DeviceOptions,
        output: OutputOptions,
    ) -> None:
        self.contestants, self.ratios = _contestants(chosen.methods), _ratios(chosen.ratios)
        for one in self.contestants:
            check_merge(MergeOptions(ratio=self.ratios[0], method=one.method, schedule=one.schedule))
        if chosen.measure not in MEASURES:
            raise UsageError(unknown_name("--measure", chosen.measure, MEASURES))
        self.chosen = chosen
        super().__init__(model, texts, device, output, f"{stem(model)}-compare", mmlu)
        self.spare_the_model(SAMPLED, MMLU, ORIGINAL, *(one.name for one in self.contestants))

    def carry_out(self) -> int:
        """Do all of it, and print table or JSON; returns the exit code."""
        with Workspace(self.out, self.progress) as self.workspace:
            self.open()
            planned = [(one, list(self._settings(one))) for one in self.contestants]
            self._check_room([settings for _, several in planned for settings in several])
            self._trials = Trials(self, self.evaluation.ids, divergence=True)
            original = self._trials.original(ORIGINAL)
            self._asked = self.asking.original() if self.asking.wanted else None
            rows = [row for one, several in planned for row in self._method(one, several)]
            self._trials.end()
            found = self._summary(original, rows)
            write_atomically(self.workspace.path / COMPARISON, found)
            draw_methods(found, [self.workspace.path / name for name in PICTURES])
            self.workspace.write_manifest(self.about())
        if self.output.json:
            print_json(found)
        else:
            print_methods(found)
            print(self.workspace.path)
        return 0

    def _settings(self, one: Contestant) -> Iterator[Settings]:
        """Yield what is asked of a method, ratio by ratio; ratios that remove as many layers are one."""
        removed = set()
        for ratio in self.ratios:
            options = MergeOptions(
                ratio=ratio,
                method=one.method,
                measure=self.chosen.measure if METHODS[one.method].measured else DEFAULT,
                schedule=one.schedule,
                protect=self.chosen.protect,
            )
            settings = merge_settings(options, self.original.num_layers)
            if settings.remove not in removed:
                removed.add(settings.remove)
                yield settings

    def _check_room(self, planned: Sequence[Settings]) -> None:
        outline, tokens = Outline.of_checkpoint(self.original), self.texts.calibration_tokens
        needs = [merge_need(outline, each.remove, each.method, tokens, CALIBRATION_WINDOW) for each in planned]
        there = sum(path.stat().st_size for path in self.out.glob(".*.pieces/**/*") if path.is_file())
        disk = max(need.kept + need.scratch for need in needs) - there
        require_room(self.out, disk, "comparing the methods", "Free space there, or choose another --out.")

    def _method(self, one: Contestant, several: Sequence[Settings]) -> Iterator[Row]:
        """Yield the results of one method, from the lowest ratio to the highest."""
        for settings in several:
            layers = self.original.num_layers - settings.remove
            self.progress.say(f"{one.name}, {layers} layers")
            yield Row(one.name, layers, self._trials.carry_out(settings, one.name))
        self._trials.end(one.name)

    def _summary(self, original: Means, rows: Sequence[Row]) -> dict[str, Any]:
        """Return all figures with their errors, as they stand in the file."""
        ours = {row.layers: row.trial.nll for row in rows if row.name == OURS and row.trial.error is None}
        bits = np.log(2) * self.evaluation.bytes_per_token
        value, error = perplexity(original[:, None])
        found: dict[str, Any] = with_nulls(
            {
                "format": FORMAT,
                "version": 1,
                "tool": versions(*PACKAGES),
                "model": {
                    "name": self.source.name,
                    "source": dict(self.provenance),
                    "layers": self.original.num_layers,
                },
                "calibration": self.calibration.describe(),
                "evaluation": self.about_evaluation(),
                "mmlu": self.asking.describe(),
                "original": {
                    "perplexity": value,
                    "perplexity_se": error,
                    "bits_per_byte": original.mean() / bits,
                    "mmlu": self._known(),
                },
                "against": OURS,
                "results": [
                    {
                        **_figures(row, original, None if row.name == OURS else ours.get(row.layers), bits),
                        "mmlu": self._known(row.trial),
                    }
                    for row in rows
                ],
            }
        )
        return found

    def _known(self, trial: Trial | None = None) -> dict[str, Any] | None:
        """Return accuracy on the questions, of the original or of a trial, and its change; None where none were asked."""
        if self._asked is None or (trial is not None and trial.error is not None):
            return None
        asked = self._asked
        if trial is not None:
            answers = Answers(MERGED, "torch", self.device.device, trial.letters)
            asked = dataclasses.replace(asked, answers=(*asked.answers, answers))
        found = compare_answers(asked, {COMPRESSION: (ORIGINAL, None)})
        step, change = found.steps[-1], found.comparisons[COMPRESSION].change
        return {
            "accuracy": dataclasses.asdict(step.accuracy),
            "change": dataclasses.asdict(change),
            "at_chance": step.at_chance,
        }


def _figures(row: Row, original: Means, ours: Means | None, bits: float) -> dict[str, Any]:
    """Return one result: figures with 95 % intervals, paired over windows with the original and, unless None, with ours."""
    trial, where = row.trial, {"name": row.name, "layers": row.layers}
    if trial.error is not None:
        return {**where, "error": trial.error}
    value, error = perplexity(trial.nll[:, None])
    columns = [trial.nll - original, trial.kl, trial.top1, trial.nll - (trial.nll if ours is None else ours)]
    ratio, kl, top1, against = bootstrap_means(np.stack(columns, axis=1))
    return {
        **where,
        "perplexity": value,
        "perplexity_se": error,
        "ppl_ratio": dataclasses.asdict(ratio.exp()),
        "bits_per_byte": float(trial.nll.mean()) / bits,
        "mean_kl": dataclasses.asdict(kl),
        "top1": dataclasses.asdict(top1),
        "ppl_against": None if ours is None else dataclasses.asdict(against.exp()),
        "seconds": trial.seconds,
        "peak_memory_bytes": trial.peak_memory_bytes,
    }


def _contestants(names: str) -> list[Contestant]:
    """Return the methods of ``--methods``.

    Raises:
        UsageError: one is none.
    """
    if names == "all":
        return ALL
    found = []
    for name in dict.fromkeys(part.strip() for part in names.split(",")):
        method, _, schedule = name.partition(":")
        if method not in METHODS or schedule not in ("", ITERATIVE, ONE_SHOT):
            raise UsageError(unknown_name("--methods", name, [one.name for one in ALL]))
        found.append(Contestant(name, method, schedule or ITERATIVE))
    return found


def _ratios(text: str) -> list[float]:
    """Return the ratios of ``--ratios``, ascending: a method that goes on from its last merge goes on here.

    Raises:
        UsageError: one is none.
    """
    try:
        ratios = sorted(map(float, text.split(",")))
    except ValueError:
        raise UsageError(f"--ratios {text}: they are numbers with commas between", "For example 0.1,0.2.") from None
    for ratio in ratios:
        require_share("--ratios", ratio)
    return ratios
