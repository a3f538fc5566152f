"""The merge plan: what was, or is to be, merged into what. JSON, for people too, and it replays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mka_export.errors import MkaError, UsageError
from mka_export.merge.fuse import METHODS

FORMAT = "mka-export/merge-plan"
VERSION = 1


@dataclass(frozen=True)
class Step:
    """One merge of two neighbouring layers.

    Attributes:
        lower, upper: the spans [first, last] of original layers that the two stood for.
        similarity: their measure when they were chosen.
        alpha: the weight of the lower layer in an average.
        figures: what the method reports.
    """

    lower: list[int]
    upper: list[int]
    similarity: float
    alpha: float
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Everything that decides which layers become one.

    Attributes:
        model: architecture, layers, fingerprint of the checkpoint it was made for.
        method: how two layers are fused.
        schedule: ``iterative`` or ``one-shot``.
        protect: how many early layers take no part.
        calibration: source, sha256 and size of the calibration tokens.
        steps: in order.
    """

    model: Mapping[str, Any]
    method: str
    schedule: str
    protect: int
    calibration: Mapping[str, Any]
    steps: list[Step]
    measure: str = "npib"

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as it stands in the file."""
        return {"format": FORMAT, "version": VERSION, **asdict(self), "layers": self.layers()}

    def layers(self) -> list[list[int]]:
        """Return the span of original layers each remaining layer stands for, bottom up.

        Raises:
            ValueError: a step merges two layers that are not neighbours when its turn comes.
        """
        spans = [[i, i] for i in range(self.model["layers"])]
        for number, step in enumerate(self.steps, 1):
            at = spans.index(step.lower) if step.lower in spans else len(spans)
            if spans[at : at + 2] != [step.lower, step.upper]:
                raise ValueError(f"step {number} merges {step.lower} and {step.upper}, which are not neighbours then")
            spans[at : at + 2] = [[step.lower[0], step.upper[1]]]
        return spans


def read_plan(path: Path) -> Plan:
    """Read a plan file.

    Raises:
        UsageError: it is not a plan, or its steps do not follow from one another.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("format") != FORMAT or data.get("version") != VERSION:
            raise UsageError(f"{path} is not a merge plan of version {VERSION}", "Give the plan.json of a merge.")
        steps = [_step(step) for step in data["steps"]]
        plan = Plan(
            dict(data["model"]),
            str(data["method"]),
            str(data["schedule"]),
            int(data["protect"]),
            dict(data["calibration"]),
            steps,
        )
        plan.layers()
    except MkaError:
        raise
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path} is not a merge plan: {error!r}", "Give the plan.json of a merge.") from error
    if plan.method not in METHODS:
        raise UsageError(f"{path} wants method {plan.method!r}, known are {', '.join(METHODS)}")
    if not steps:
        raise UsageError(f"{path} merges nothing")
    return plan


def _step(data: Mapping[str, Any]) -> Step:
    lower, upper = ([int(i) for i in data[key]] for key in ("lower", "upper"))
    alpha = float(data["alpha"])
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}")
    return Step(lower, upper, float(data["similarity"]), alpha, dict(data.get("figures", {})))
