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

from mka_export.errors import MkaError, UsageError
from mka_export.merge.choose import Settings
from mka_export.models.checkpoint import read_json
from mka_export.models.outline import Outline
from mka_export.models.runner import NotFinite
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


@dataclass
class Depth:
    """What a limit leaves of a model.

    Attributes:
        remove: how many layers go.
        limit: what it is, in words.
        limited_by: why no layer more goes, or none less, in words.
        tried: the perplexity ratios that were measured, each with the layers that were left and the runtime.
    """

    remove: int
    limit: str
    limited_by: str
    tried: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return what the report says of it."""
        return {"limit": self.limit, "limited_by": self.limited_by, "tried": self.tried}


def fewest_that_fit(model: Outline, targets: Sequence[Target], nbytes: int, most: int) -> Depth:
    """Return the fewest layers without which every target's artifact takes at most so many bytes.

    Args:
        model: the original.
        most: how many can go.

    Raises:
        MkaError: even then one is too large.
    """

    def largest(remove: int) -> str:
        shallow = model.with_layers(model.num_layers - remove)
        kept, name = max(
            (load_converter(target.converter).need(shallow, target).kept, target.name) for target in targets
        )
        return f"with {shallow.num_layers} layers {name} may take {size(kept)}" if kept > nbytes else ""

    why = largest(0)
    for remove in range(1, most + 1):
        before, why = why, largest(remove)
        if not why:
            return Depth(remove, f"{size(nbytes)} for an artifact", before or "one layer has to go")
    raise MkaError(f"--max-size {size(nbytes)}: even {why}", "Allow more, or choose another --to.")


def deepest(measure: Callable[[int], Interval | None], limit: float, layers: int, most: int) -> Depth:
    """Return the most layers whose absence leaves the whole interval of the perplexity ratio within a limit.

    They are found by halving: where some are too many, more are taken to be so too.

    Args:
        measure: layers that go -> the perplexity ratio; None where so many cannot be merged.
        layers: of the original.
        most: how many can go.

    Raises:
        MkaError: not one can.
    """
    tried, within, broken = [], 0, most + 1
    why = f"{layers - most} of {layers} layers cannot go"
    while broken - within > 1:
        remove = (within + broken) // 2
        ratio = measure(remove)
        if ratio is not None:
            tried.append(_attempt(layers - remove, ratio, "torch"))
        if ratio is not None and ratio.high <= limit:
            within = remove
        else:
            broken = remove
            why = f"{remove} cannot be merged" if ratio is None else f"with {layers - remove} {_shown(ratio)}, in torch"
    if within == 0:
        raise _no_layer(why, limit)
    return Depth(within, f"a perplexity ratio of at most {limit:g}", why, tried)


def one_less(depth: Depth, layers: int, targets: Sequence[Mapping[str, Any]]) -> Depth | None:
    """Return a depth with one layer more if an artifact broke the limit, in its runtime; else None.

    Args:
        layers: of the original.
        targets: the report's entries.

    Raises:
        MkaError: then none would go.
    """
    left = layers - depth.remove
    for target in targets:
        for check in ((target["comparisons"] or {}).get(COMPRESSION) or {}).get("checks", ()):
            if check["metric"] == "ppl_ratio" and check["verdict"] != "pass":
                ratio = Interval(*(math.nan if check[key] is None else check[key] for key in ("value", "low", "high")))
                runtime = target["runtime"]["name"]
                why = f"with {left} {_shown(ratio)}, in {runtime}"
                if depth.remove == 1:
                    raise _no_layer(why, check["limit"])
                tried = [*depth.tried, _attempt(left, ratio, runtime)]
                return Depth(depth.remove - 1, depth.limit, why, tried)
    return None


def search(job: Job, settings: Settings, limit: float) -> Depth:
    """Return the depth that a limit of the perplexity ratio allows, measured in torch.

    The windows lie between those of the verdict, which would be none on what it helped to choose.

    Args:
        job: opened, with its workspace.
        settings: the deepest merge there can be.

    Raises:
        MkaError: no layer can go, or the text is too short.
    """
    count, layers = 2 * job.texts.windows - 1, job.original.num_layers
    windows = job.evaluation_windows(count).ids[1::2]
    trials, folder = Trials(job), job.workspace.path / DEPTH
    seen = {
        **job.inputs(job.original),
        "evaluation": hashlib.sha256(windows.tobytes()).hexdigest(),
        "device": job.device.device,
    }

    def measure_original(stage: Path, pieces: Path) -> None:
        write_json(stage / RESULT, _result(score(windows, job.reference, {}, job.progress)))

    def ratio_without(remove: int) -> Interval | None:
        tried = dataclasses.replace(settings, remove=remove)
        inputs = {**seen, "calibration": job.calibration.sha256, "merge": dataclasses.asdict(tried)}
        same = {**inputs, "merge": {**inputs["merge"], "remove": None}}

        def make(stage: Path, pieces: Path) -> None:
            try:
                trial = trials.carry_out(tried, stage, kept_pieces(folder, same), windows, {})
            except (UsageError, NotFinite) as error:
                write_json(stage / RESULT, {"error": str(error)})
            else:
                write_json(stage / RESULT, _result(trial.scores))

        merged = read_json(job.workspace.stage(tried_stage(layers - remove), inputs, make).path / RESULT)
        if "error" in merged:
            return None
        gaps = np.array(merged["nll"], dtype=np.float64) - original["nll"]  # None becomes NaN
        return bootstrap_means(gaps[:, None])[0].exp()

    original = read_json(job.workspace.stage(f"{DEPTH}/{ORIGINAL}", seen, measure_original).path / RESULT)
    found = deepest(ratio_without, limit, layers, settings.remove)
    trials.end()
    shutil.rmtree(pieces_folder(folder), ignore_errors=True)
    return found


def tried_stage(layers: int) -> str:
    """Return the name of the stage that tried a depth; it holds the plan of the merge."""
    return f"{DEPTH}/{layers}-layers"


def _result(scores: Scores) -> dict[str, Any]:
    found: dict[str, Any] = with_nulls({"nll": scores.nll[ARTIFACT].mean(axis=1).tolist()})
    return found


def _attempt(layers: int, ratio: Interval, runtime: str) -> dict[str, Any]:
    return {"layers": layers, "ppl_ratio": with_nulls(dataclasses.asdict(ratio)), "runtime": runtime}


def _no_layer(why: str, limit: float) -> MkaError:
    return MkaError(
        f"--ratio auto: no layer can go: {why}, and the limit is {limit:g}",
        "Raise --max-ppl-ratio, or give --calibration a text like the one that counts.",
    )


def _shown(ratio: Interval) -> str:
    return f"the perplexity ratio is {ratio.value:.4g} ({ratio.low:.4g} to {ratio.high:.4g})"
