"""How many layers go where a limit decides it: ``--ratio auto``."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mka_export.errors import MkaError, UsageError
from mka_export.merge.choose import Settings
from mka_export.merge.stage import PLAN
from mka_export.models.checkpoint import read_json
from mka_export.models.outline import Outline
from mka_export.models.runner import MakesNaN
from mka_export.needs import size
from mka_export.parity.comparison import COMPRESSION, ORIGINAL
from mka_export.parity.metrics import ARTIFACT, Scores, score
from mka_export.parity.statistics import Interval, bootstrap_means
from mka_export.pipeline.job import Job
from mka_export.pipeline.trials import Trials
from mka_export.report import with_nulls
from mka_export.target import Target, load_converter
from mka_export.workspace import kept_pieces, pieces_folder, write_json

DEPTH, RESULT = "depth", "result.json"


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
        return f"with {shallow.num_layers} {name} may take {size(kept)}" if kept > nbytes else ""

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


def search(job: Job, settings: Settings, limit: float) -> Depth:
    """Return the depth that a limit of the perplexity ratio allows, measured in torch.

    The windows lie between those of the verdict, which would be none on what it helped to choose.

    Args:
        job: opened, with its workspace.
        settings: the deepest merge there can be.

    Raises:
        MkaError: no layer can go, or the text is too short or tells nothing.
    """
    count, layers = 2 * job.texts.windows - 1, job.original.num_layers
    try:
        windows = job.evaluation_windows(count).ids[1::2]
    except MkaError as error:
        raise MkaError(f"--ratio auto measures on windows between those of the verdict too: {error}") from error
    trials, folder, plans = Trials(job), job.workspace.path / DEPTH, {}
    seen = {
        **job.inputs(job.original),
        "evaluation": hashlib.sha256(windows.tobytes()).hexdigest(),
        "device": job.device.device,
    }

    def measure_original(stage: Path, pieces: Path) -> None:
        write_json(stage / RESULT, _result(score(windows, job.reference, {}, job.progress)))
        job.reference.close()  # its states need not be in memory while others are merged

    def ratio_without(remove: int) -> Interval | str:
        tried = dataclasses.replace(settings, remove=remove)
        inputs = {**seen, "calibration": job.calibration.sha256, "merge": dataclasses.asdict(tried)}
        same = {**inputs, "merge": {**inputs["merge"], "remove": None}}

        def make(stage: Path, pieces: Path) -> None:
            try:
                trial = trials.carry_out(tried, stage, kept_pieces(folder, same), windows, {})
            except (UsageError, MakesNaN) as error:
                write_json(stage / RESULT, {"error": str(error)})
            else:
                write_json(stage / RESULT, _result(trial.scores))

        stage = job.workspace.stage(f"{DEPTH}/{layers - remove}-layers", inputs, make)
        merged = read_json(stage.path / RESULT)
        if "error" in merged:
            return str(merged["error"])
        plans[remove] = stage.path / PLAN
        return bootstrap_means((_losses(merged) - original)[:, None])[0].exp()

    original = _losses(read_json(job.workspace.stage(f"{DEPTH}/{ORIGINAL}", seen, measure_original).path / RESULT))
    if not original.mean() < chance(job.original.vocab_size):
        raise MkaError(
            "--ratio auto: the original guesses no better than chance on the evaluation text, so its perplexity tells "
            "nothing",
            "Give another --text, or a fixed --ratio.",
        )
    found = deepest(ratio_without, limit, layers, settings.remove)
    trials.end()
    shutil.rmtree(pieces_folder(folder), ignore_errors=True)
    if found.remove == 0:
        raise MkaError(
            f"--ratio auto: no layer can go: {found.limited_by}, and the limit is {limit:g}",
            "Raise --max-ppl-ratio, or give --calibration a text like the one that counts.",
        )
    return dataclasses.replace(found, plans=plans)


def _losses(result: Mapping[str, Any]) -> NDArray[np.float64]:
    return np.array(result["nll"], dtype=np.float64)  # None becomes NaN


def _result(scores: Scores) -> dict[str, Any]:
    found: dict[str, Any] = with_nulls({"nll": scores.nll[ARTIFACT].mean(axis=1).tolist()})
    return found


def _attempt(layers: int, ratio: Interval, runtime: str) -> dict[str, Any]:
    return {"layers": layers, "ppl_ratio": with_nulls(dataclasses.asdict(ratio)), "runtime": runtime}


def _shown(attempt: Mapping[str, Any]) -> str:
    value, low, high = (
        "no number" if figure is None else f"{figure:.4g}"
        for figure in map(attempt["ppl_ratio"].get, ("value", "low", "high"))
    )
    return f"with {attempt['layers']} it is {value} ({low} to {high}), in {attempt['runtime']}"
