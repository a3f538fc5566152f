"""Targets: what to make and how good it must be; and the converters that make it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mka_export.data import data_folder, read_toml, value_of
from mka_export.errors import ConversionError, MkaError, UsageError, unknown_name
from mka_export.needs import Need, parse_size, size
from mka_export.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from mka_export.models.activations import Activations
    from mka_export.models.checkpoint import Checkpoint
    from mka_export.models.outline import Outline

CONVERTERS = "mka_export.converters"  # the entry-point group


@dataclass(frozen=True)
class Limits:
    """What an artifact must keep to pass. A limit that is None is shown and does not decide.

    Attributes:
        max_ppl_ratio: artifact perplexity / reference perplexity.
        max_mean_kl: mean KL divergence from the reference, in nats per token.
        min_top1: share of positions where both prefer the same next token.
        max_mmlu_drop: accuracy on MMLU that may be lost, as a share of all questions.
    """

    max_ppl_ratio: float | None = None
    max_mean_kl: float | None = None
    min_top1: float | None = None
    max_mmlu_drop: float | None = None


@dataclass(frozen=True)
class Budget:
    """What the devices that a target is for have for a model.

    Attributes:
        memory: bytes, for its weights and its key-value cache together.
        context: tokens that the cache has to hold.
    """

    memory: int
    context: int

    def taken(self, nbytes: int, cache: int) -> int:
        """Return the bytes that an artifact of ``nbytes`` takes with a full cache, of which a token takes ``cache``."""
        return nbytes + self.context * cache


@dataclass(frozen=True)
class Target:
    """One file of ``targets/``.

    Attributes:
        name: the file's name without ``.toml``.
        description: one line for ``mka-export targets``.
        converter: entry-point name of the converter.
        precision: the converter's own name of the number format.
        runtime: name of the runtime that ships with it (``parity/runtimes``).
        activations: whether the converter is given column statistics of the calibration text,
        calibration: and whether the text itself.
        families: architectures it can express; empty for all.
        budget: what the devices it is for have; None where it is for no certain ones.
        conversion: limits against the checkpoint it was made from.
        compression: limits against the original model.
        options: anything else the converter understands.
    """

    name: str
    description: str
    converter: str
    precision: str
    runtime: str
    conversion: Limits
    compression: Limits
    activations: bool = False
    calibration: bool = False
    families: tuple[str, ...] = ()
    budget: Budget | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def packages(self) -> tuple[str, ...]:
        """Whose versions an artifact depends on, besides those of every stage: the converter's ``PACKAGES``."""
        return load_converter(self.converter).PACKAGES

    def require_family(self, family: str) -> None:
        """Check that the target is for models of a family.

        Raises:
            UsageError: it is not.
        """
        if self.families and family not in self.families:
            raise UsageError(
                f"target {self.name} is for {', '.join(self.families)}, not {family}", "Choose another --to."
            )

    def require_budget(self, need: Need) -> None:
        """Check that an artifact fits the devices that the target is for.

        Args:
            need: its converter's, for the model.

        Raises:
            ConversionError: it may not.
        """
        if self.budget is None:
            return
        if (taken := self.budget.taken(need.kept, need.cache)) > self.budget.memory:
            raise ConversionError(
                f"target {self.name} is for devices with {size(self.budget.memory)} for a model; this one may take "
                f"{size(taken)}, {size(taken - need.kept)} of it for {self.budget.context:,} tokens of context",
                "Remove more layers, or choose another --to.",
            )


@dataclass(frozen=True)
class Artifact:
    """The files that ship.

    Attributes:
        path: what the runtime opens: a file or a folder.
        files: every file, relative to the stage folder.
        nbytes: their size together.
        details: what the converter wants told: tensor types, fallbacks, warnings.
    """

    path: Path
    files: tuple[str, ...]
    nbytes: int
    details: Mapping[str, Any] = field(default_factory=dict)


class Converter(Protocol):
    """A module that turns checkpoints into artifacts.

    Attributes:
        PACKAGES: whose versions an artifact depends on, besides torch, transformers, tokenizers and numpy.

    Raises:
        ConversionError, UnsupportedError: it cannot be made; nothing else may escape.
    """

    PACKAGES: tuple[str, ...]

    def check(self, checkpoint: Checkpoint, target: Target) -> None:
        """Say what can be said beforehand: whether the target's settings are known, and the model can be expressed.

        Called with the original, before hours are spent on merging it.
        """

    def need(self, model: Outline, target: Target) -> Need:
        """Return what converting a model will take, before there is one: no less than it will.

        Raises what ``check`` would, as far as there is no checkpoint to look into.
        """

    def bits_per_weight(self, model: Outline, target: Target) -> float | None:
        """Return what ``details["bits_per_weight"]`` of an artifact of a model would be; None if that cannot be said.

        Where the mix of types follows the layers, fewer of them are another mix, whose bits are part of what was lost.
        """

    def unpacked_bytes(self, model: Outline, target: Target) -> int:
        """Return the most bytes that ``unpack`` writes for an artifact of ``model``."""

    def unpack(self, artifact: Path, target: Target, checkpoint: Checkpoint, out: Path, progress: Progress) -> None:
        """Write the weights of an artifact as a checkpoint into the existing empty folder ``out``.

        Args:
            artifact: its path.
            target: what it was made for.
            checkpoint: what it was made from.

        Raises:
            CheckpointError, UnsupportedError: they cannot be read back.
            MkaError: the disk has no room.
        """

    def convert(
        self,
        checkpoint: Checkpoint,
        target: Target,
        out: Path,
        pieces: Path,
        *,
        activations: Activations | None,
        calibration: Tensor | None,
        progress: Progress,
    ) -> Artifact:
        """Make the artifact inside the existing empty folder ``out``.

        ``activations`` and ``calibration``, token windows (N, T), are what the target asks for.

        A file that takes long to make, and from which others are made, may be left in the existing folder ``pieces``:
        it is there again if the work was killed and goes on with the same checkpoint and target.
        """


def target_names() -> dict[str, Path]:
    """Return the shipped targets: name -> file."""
    return {path.stem: path for path in sorted(data_folder("targets").glob("*.toml"))}


def load_target(name: str) -> Target:
    """Load a shipped target by name, or any TOML file by path.

    Raises:
        UsageError: there is no such target, or its file lacks or misnames a field.
    """
    known = target_names()
    path = known.get(name) or Path(name)
    if path.suffix != ".toml" or not path.is_file():
        raise UsageError(unknown_name("target", name, known), "A path to a .toml file works too.")
    data = read_toml(path)
    try:
        return _target(path.stem, data)
    except ValueError as error:
        raise UsageError(f"{path}: {error}", "The fields of a target are in CONTRIBUTING.md.") from error


def _target(name: str, data: Mapping[str, Any]) -> Target:
    if name.startswith(".") or not name.isprintable():  # it becomes a folder's; hidden ones are for work in progress
        raise ValueError(f"a target cannot be called {name!r}")
    data = {
        "activations": False,
        "calibration": False,
        "families": [],
        "conversion": {},
        "compression": {},
        "options": {},
        **data,
    }
    require_known(data, "field", {f.name for f in fields(Target)} - {"name"})
    families = value_of(data, "families", list)
    if not all(isinstance(family, str) for family in families):
        raise ValueError(f"families = {families} are not names")
    return Target(
        name=name,
        description=value_of(data, "description", str),
        converter=value_of(data, "converter", str),
        precision=value_of(data, "precision", str),
        runtime=value_of(data, "runtime", str),
        conversion=limits_of(value_of(data, "conversion", dict)),
        compression=limits_of(value_of(data, "compression", dict)),
        activations=value_of(data, "activations", bool),
        calibration=value_of(data, "calibration", bool),
        families=tuple(families),
        budget=_budget(value_of(data, "budget", dict)) if "budget" in data else None,
        options=value_of(data, "options", dict),
    )


def limits_of(data: Mapping[str, Any]) -> Limits:
    """Return the limits in a table.

    Raises:
        ValueError: one is unknown, or cannot be.
    """
    require_known(data, "limit", {f.name for f in fields(Limits)})
    limits = {name: value_of(data, name, float) for name in data}
    for name, limit in limits.items():
        if limit < 0 or (name == "min_top1" and limit > 1):
            raise ValueError(f"{name} = {limit} cannot be")
    return Limits(**limits)


def _budget(data: Mapping[str, Any]) -> Budget:
    require_known(data, "field of budget", {f.name for f in fields(Budget)})
    context = value_of(data, "context", int)
    if context < 1:
        raise ValueError(f"context = {context} cannot be")
    return Budget(parse_size(value_of(data, "memory", str)), context)


def require_known(data: Mapping[str, Any], kind: str, known: set[str]) -> None:
    """Check that a table has no other keys.

    Raises:
        ValueError: it has; the message has the nearest spelling.
    """
    if unknown := sorted(data.keys() - known):
        raise ValueError(unknown_name(kind, unknown[0], known))


def load_converter(name: str) -> Converter:
    """Return the converter registered under ``name`` in the entry-point group ``mka_export.converters``.

    Raises:
        MkaError: none is installed under that name.
    """
    found = {point.name: point for point in entry_points(group=CONVERTERS)}
    if name not in found:
        raise MkaError(unknown_name("converter", name, found), "Install the package that brings it.")
    converter: Converter = found[name].load()
    return converter
