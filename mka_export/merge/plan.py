"""The merge plan: what was, or is to be, merged into what. JSON, for people too, and it replays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mka_export.data import load_json, value_of
from mka_export.errors import UsageError, unknown_name
from mka_export.merge.measures import MEASURES
from mka_export.merge.methods import METHODS
from mka_export.merge.steps import Step, merge_spans, step_from
from mka_export.models.architecture import MAX_LAYERS

FORMAT = "mka-export/merge-plan"
VERSION = 1


@dataclass(frozen=True)
class Plan:
    """Everything that decides which layers become one.

    Attributes:
        model: architecture, layers, fingerprint of the checkpoint it was made for.
        method: how layers are chosen and become one.
        measure: of the similarity of layers.
        schedule: ``iterative`` or ``one-shot``.
        protect: how many early layers take no part.
        calibration: source, sha256 and size of the calibration tokens.
        steps: in order.
    """

    model: Mapping[str, Any]
    method: str
    measure: str
    schedule: str
    protect: int
    calibration: Mapping[str, Any]
    steps: list[Step]

    @property
    def remove(self) -> int:
        """How many layers go."""
        return int(self.model["layers"]) - len(self.layers())

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as it stands in the file."""
        return {"format": FORMAT, "version": VERSION, **asdict(self), "layers": self.layers()}

    def layers(self) -> list[list[int]]:
        """Return the span of original layers each remaining layer stands for, bottom up.

        Raises:
            ValueError: a step merges layers that are not neighbours when its turn comes.
        """
        spans = [[i, i] for i in range(self.model["layers"])]
        for number, step in enumerate(self.steps, 1):
            try:
                choice = step.choice(spans)
            except ValueError as error:
                raise ValueError(f"step {number} merges {error}") from error
            merge_spans(spans, choice)
        return spans


def read_plan(path: Path) -> Plan:
    """Read a plan file.

    Raises:
        UsageError: it is not a plan, or its steps do not follow from one another.
    """
    try:
        return _plan(load_json(path))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not a merge plan: {error}", "Give the plan.json of a merge.") from error


def _plan(data: Mapping[str, Any]) -> Plan:
    if (data.get("format"), data.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"it has not the format {FORMAT} of version {VERSION}")
    model = value_of(data, "model", dict)
    value_of(model, "architecture", str)
    if not 1 <= (layers := value_of(model, "layers", int)) <= MAX_LAYERS:
        raise ValueError(f"layers = {layers} is not between 1 and {MAX_LAYERS}")
    if (method := value_of(data, "method", str)) not in METHODS:
        raise ValueError(unknown_name("method", method, METHODS))
    if (protect := value_of(data, "protect", int)) < 0:
        raise ValueError(f"protect = {protect} is negative")
    if (measure := value_of(data, "measure", str)) not in MEASURES:
        raise ValueError(unknown_name("measure", measure, MEASURES))
    steps = [step_from(step) for step in value_of(data, "steps", list)]
    if not steps:
        raise ValueError("it merges nothing")
    calibration, schedule = value_of(data, "calibration", dict), value_of(data, "schedule", str)
    plan = Plan(model, method, measure, schedule, protect, calibration, steps)
    plan.layers()
    return plan
