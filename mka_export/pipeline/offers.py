"""What a model can be made into, said before anything is fetched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mka_export.errors import MkaError
from mka_export.models.checkpoint import Checkpoint
from mka_export.models.expected import expected_outline
from mka_export.models.outline import Outline
from mka_export.models.sources import resolve
from mka_export.needs import Need
from mka_export.target import Target, load_converter, load_target, target_names


@dataclass(frozen=True)
class Offer:
    """A shipped target, for one model with all of its layers.

    Attributes:
        target: what would be made.
        need: what making it takes at most, of which ``kept`` is the artifact's size; None where it cannot be made.
        problem: why it cannot be made.
    """

    target: Target
    need: Need | None
    problem: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "target": self.target.name,
            "precision": self.target.precision,
            "runtime": self.target.runtime,
            "description": self.target.description,
            "nbytes": self.need and self.need.kept,
            "memory": self.need and self.need.memory,
            "problem": self.problem,
        }


def offers(name: str) -> list[Offer]:
    """Return what each shipped target would be for a model.

    Of a model that is not here yet its config tells; of a checkpoint folder the tokenizer is looked at too.

    Raises:
        SourceError, CheckpointError, UnsupportedError: the model cannot be had, or read.
    """
    source = resolve(name)
    model = expected_outline(source)
    here = Checkpoint.open(Path(source.id)) if source.kind == "directory" else None
    return [_offer(load_target(target), model, here) for target in target_names()]


def _offer(target: Target, model: Outline, here: Checkpoint | None) -> Offer:
    try:
        target.require_family(model.architecture.name)
        converter = load_converter(target.converter)
        if here is not None:
            converter.check(here, target)
        need = converter.need(model, target)
        target.require_budget(need)
        return Offer(target, need, None)
    except MkaError as error:
        return Offer(target, None, str(error))
