"""How many layers go where a limit decides it: ``--ratio auto``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from mka_export.errors import MkaError, UsageError
from mka_export.merge.choose import Settings
from mka_export.merge.plan import Plan, read_plan
from mka_export.models.checkpoint import read_json
from mka_export.models.outline import Outline
from mka_export.needs import size
from mka_export.options import MergeOptions
from mka_export.parity.comparison import COMPRESSION, ORIGINAL
from mka_export.parity.runtimes import RUNTIME_PACKAGES
from mka_export.parity.statistics import Interval, bootstrap_means
from mka_export.pipeline.job import DEPTH, Job
from mka_export.pipeline.requests import merge_settings
from mka_export.pipeline.trials import RESULT, Trials
from mka_export.publish import write_json
from mka_export.report import with_nulls
from mka_export.target import Target, load_converter


@dataclass(frozen=True)
class Depth:
    """What a limit leaves of a model.

    Attributes:
        remove: how many layers go.
        limit: what it is, in words.
        limited_by: why no layer more goes, or none less, in words.
        tried: what was measured: ``layers`` that were left, ``ppl_ratio`` to the original, ``runtime``.
        plans: layers that go -> the plan of a merge that was tried.
    """

    remove: int
    limit: str
    limited_by: str
    tried: list[dict[str, Any]] = field(default_factory=list)
    plans: Mapping[int, Path] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return what the report says of it."""
        return {"limit": self.limit, "limited_by": self.limited_by, "tried": self.tried}


def fewest_that_fit(model: Outline, targets: Sequence[Target], nbytes: int, most: int) -> Depth:
    """Return how few layers must go for every target's artifact to fit, by the most that its converter may make of it.

    Args:
        model: the original.
        nbytes: what each artifact may take.
        most: how many layers can go.

    Raises:
        UsageError: none has to, or even so one is too large.
    """

    def too_large(remove: int) -> str:
        shallow = model.with_layers(model.num_layers - remove)
        kept, name = max(
            (load_converter(target.converter).need(shallow, target).kept, target.name) for target in targets
        )
        return f"with {shallow.num_layers} layers {name} may take {size(kept)}" if kept > nbytes else ""

    why = too_large(0)
    if not why:
        raise UsageError(f"--max-size {size(nbytes)}: the artifacts fit as they are", "Use 'mka-export convert'.")
    for remove in range(1, most + 1):
        before, why = why, too_large(remove)
        if not why:
            return Depth(remove, f"artifacts of at most {size(nbytes)}", before)
    raise UsageError(f"--max-size {size(nbytes)}: even {why}", "Allow more, or choose another --to.")


def deepest(measure: Callable[[int], Interval | str], limit: float, layers: int, most: int) -> Depth:
    """Return the most layers whose absence leaves the whole interval of the perplexity ratio within a limit, or none.

    They are found by halving: where some are too many, more are taken to be so too.

    Args:
        measure: layers that go -> the perplexity ratio; or why so many cannot be merged.
        layers: of the original.
        most: how many can go.
    """
    tried, within, broken = [], 0, most + 1
    why = f"{layers - most} of {layers} cannot go"
    while broken - within > 1:
        remove = (within + broken) // 2
        ratio = measure(remove)
        if isinstance(ratio, Interval):
            tried.append(_attempt(layers - remove, ratio, "torch"))
        if isinstance(ratio, Interval) and ratio.high <= limit:
            within = remove
        else:
            broken = remove
            why = f"{remove} cannot go ({ratio})" if isinstance(ratio, str) else _shown(tried[-1])
    return Depth(within, f"a perplexity ratio of at most {limit:g}", why, tried)


def broken_limit(left: int, targets: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return an entry for ``Depth.tried`` if an artifact with ``left`` layers runs and breaks the limit, else None.

    Args:
        targets: the report's entries.
    """
    for target in targets:
        for check in ((target["comparisons"] or {}).get(COMPRESSION) or {}).get("checks", ()):
            if check["metric"] == "ppl_ratio" and check["verdict"] != "pass" and not target["error"]:
                ratio = {key: check[key] for key in ("value", "low", "high")}
                return {"layers": left, "ppl_ratio": ratio, "runtime": target["runtime"]["name"]}
    return None


def one_less(depth: Depth, attempt: dict[str, Any]) -> Depth:
    """Return a depth with one layer more: what was attempted broke the limit."""
    return dataclasses.replace(
        depth, remove=depth.remove - 1, limited_by=_shown(attempt), tried=[*depth.tried, attempt]
    )


def chance(vocabulary: int) -> float:
    """Return the loss of guessing evenly among so many tokens, in nats."""
    return math.log(vocabulary)


class AutoRatio:
    """``--ratio auto`` of one job: a limit decides how many layers go.

    Args:
        job: which merges and makes the targets.
        options: of the merge.
        targets: whose artifacts keep to the limit.

    Attributes:
        depth: what the limit leaves, once it is settled.
        searches: whether depths are tried; a limit of the size is kept by counting.
    """

    depth: Depth | None = None

    def __init__(self, job: Job, options: MergeOptions, targets: Sequence[Target]) -> None:
        self._job, self._options, self._targets = job, options, targets
        self.searches = options.max_size is None

    def least(self, model: Outline) -> int:
        """Return how many layers of the original go at least.

        Raises:
            UsageError: its artifacts keep to the limit of the size as they are, or even the smallest do not.
        """
        return 1 if self.searches else self._fewest(model).remove

    def _fewest(self, model: Outline) -> Depth:
        assert self._options.max_size is not None
        most = merge_settings(self._options, model.num_layers).remove
        return fewest_that_fit(model, self._targets, self._options.max_size, most)

    def settle(self) -> None:
        """Find the depth; the job is opened, with its workspace.

        Raises:
            MkaError: no layer can go, or not enough; or the text is too short or tells nothing.
        """
        if self.searches:
            limits = [target.compression.max_ppl_ratio for target in self._targets]
            self.depth = self._search(min(limit for limit in limits if limit is not None))
            while self.depth.remove > 1 and (refused := self._job.workspace.kept(*self._refusal())) is not None:
                self.depth = one_less(self.depth, read_json(refused.path / RESULT))
        else:
            self.depth = self._fewest(Outline.of_checkpoint(self._job.original))
        self._say()

    @property
    def stepped_back(self) -> bool:
        """Whether an artifact broke the limit, so that the windows of the verdict chose the depth."""
        return self.depth is not None and any(attempt["runtime"] != "torch" for attempt in self.depth.tried)

    def merge(self) -> Settings | Plan:
        """Return what to merge: the plan that was tried, where one was."""
        assert self.depth is not None
        if (tried := self.depth.plans.get(self.depth.remove)) is not None:
            return read_plan(tried)
        return dataclasses.replace(self._deepest(), remove=self.depth.remove)

    def step_back(self, targets: Sequence[Mapping[str, Any]]) -> bool:
        """Let one layer less go, if there are several and an artifact breaks the limit; returns whether it does.

        That is remembered, so that an interrupted job goes on there.

        Args:
            targets: the report's entries.
        """
        assert self.depth is not None
        attempt = broken_limit(self._job.original.num_layers - self.depth.remove, targets) if self.searches else None
        if attempt is None or self.depth.remove == 1:
            return False
        name, inputs = self._refusal()
        self._job.workspace.stage(name, inputs, lambda folder, pieces: write_json(folder / RESULT, attempt))
        self.depth = one_less(self.depth, attempt)
        self._say()
        return True

    def _deepest(self) -> Settings:
        return merge_settings(self._options, self._job.original.num_layers)

    def _refusal(self) -> tuple[str, dict[str, Any]]:
        """Return name and inputs of the stage that says that artifacts of the depth break the limit."""
        assert self.depth is not None
        job = self._job
        packages = ((*target.packages, *RUNTIME_PACKAGES[target.runtime]) for target in self._targets)
        inputs = {
            **job.inputs(job.original, *chain(*packages)),
            "calibration": job.calibration.sha256,
            **job.evaluation_inputs(),
            "devices": dataclasses.asdict(job.device),
            "merge": dataclasses.asdict(self._deepest()),
            "targets": [dataclasses.asdict(target) for target in self._targets],
        }
        return f"{DEPTH}/{job.original.num_layers - self.depth.remove}-layers-refused", inputs

    def _say(self) -> None:
        assert self.depth is not None
        left = self._job.original.num_layers - self.depth.remove
        self._job.progress.say(f"{left} layers are the limit of {self.depth.limit}: {self.depth.limited_by}")

    def _search(self, limit: float) -> Depth:
        """Return the depth that a limit of the perplexity ratio allows, measured in torch.

        The windows lie between those of the verdict, which would be none on what it helped to choose.
        """
        job = self._job
        try:
            windows = job.evaluation_windows(2 * job.texts.windows - 1).ids[1::2]
        except MkaError as error:
            raise MkaError(f"--ratio auto measures on windows between those of the verdict too: {error}") from error
        trials, plans, settings = Trials(job, windows, divergence=False), {}, self._deepest()
        original = trials.original(f"{DEPTH}/{ORIGINAL}")
        if not original.mean() < chance(job.original.vocab_size):
            raise MkaError(
                "--ratio auto: the original guesses no better than chance on the evaluation text, so its perplexity tells "
                "nothing",
                "Give another --text, or a fixed --ratio.",
            )

        def ratio_without(remove: int) -> Interval | str:
            trial = trials.carry_out(dataclasses.replace(settings, remove=remove), DEPTH)
            if trial.error is not None:
                return trial.error
            plans[remove] = trial.plan
            return bootstrap_means((trial.nll - original)[:, None])[0].exp()

        found = deepest(ratio_without, limit, job.original.num_layers, settings.remove)
        trials.end(DEPTH)
        trials.end()
        if found.remove == 0:
            raise MkaError(
                f"--ratio auto: no layer can go: {found.limited_by}, and the limit is {limit:g}",
                "Raise --max-ppl-ratio, or give --calibration a text like the one that counts.",
            )
        return dataclasses.replace(found, plans=plans)


def _attempt(layers: int, ratio: Interval, runtime: str) -> dict[str, Any]:
    return {"layers": layers, "ppl_ratio": with_nulls(dataclasses.asdict(ratio)), "runtime": runtime}


def _shown(attempt: Mapping[str, Any]) -> str:
    value, low, high = (
        "no number" if figure is None else f"{figure:.4g}"
        for figure in map(attempt["ppl_ratio"].get, ("value", "low", "high"))
    )
    return f"with {attempt['layers']} it is {value} ({low} to {high}), in {attempt['runtime']}"
