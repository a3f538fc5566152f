"""The file of ``check --config``: what is checked, against what, and how."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mka_export.converting import is_plain_name
from mka_export.data import read_toml, value_of
from mka_export.errors import UsageError
from mka_export.models.catalog import catalog
from mka_export.options import MmluOptions, TextOptions
from mka_export.parity.mmlu.questions import HUB
from mka_export.target import Limits, limits_of, load_target, require_known, target_names

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

TEXT = {name: name for name in ("text", "windows", "window_tokens")}  # key -> field of the options
MMLU = {"source": "mmlu", "questions": "mmlu_questions", "shots": "mmlu_shots", "seed": "mmlu_seed"}
ARTIFACT = {"path", "name", "target", "checkpoint", "conversion", "compression"}

Options = TypeVar("Options", bound="DataclassInstance")


@dataclass(frozen=True)
class Wanted:
    """An artifact to check.

    Attributes:
        path: the file or folder.
        name: of its entry in the report; empty for one made from the path.
        checkpoint: what it was made from, where that is known.
        conversion: limits against that.
        compression: limits against the original; None for the usual ones.
    """

    path: Path
    name: str = ""
    checkpoint: Path | None = None
    conversion: Limits = Limits()  # noqa: RUF009 (it is frozen)
    compression: Limits | None = None


@dataclass(frozen=True)
class Plan:
    """A whole check.

    Attributes:
        name: of the file, which the output folder is named after; empty where there is none.
        model: what the artifacts are held against.
        artifacts: at least one.
        texts: the evaluation text.
        mmlu: the questions.
    """

    name: str
    model: str
    artifacts: list[Wanted]
    texts: TextOptions
    mmlu: MmluOptions


def read_config(path: Path, texts: TextOptions, mmlu: MmluOptions) -> Plan:
    """Read a file; paths in it are from its own folder.

    Args:
        texts, mmlu: what holds where the file says nothing.

    Raises:
        MkaError: it cannot be read, or is not TOML.
        UsageError: it lacks or misnames something, or has a value that cannot be.
    """
    data, base = read_toml(path), path.parent
    try:
        require_known(data, "key", {"model", "artifacts", "mmlu", *TEXT})
        tables = value_of(data, "artifacts", list)
        if not tables or not all(isinstance(table, dict) for table in tables):
            raise ValueError("artifacts are tables, as [[artifacts]] makes them, one at least")
        asked = value_of(data, "mmlu", dict) if "mmlu" in data else {}
        questions = _options(mmlu, asked, MMLU, base)
        if questions.mmlu not in (None, HUB) and "source" in asked:
            questions = dataclasses.replace(questions, mmlu=str(base / str(questions.mmlu)))
        return Plan(
            name=path.stem,
            model=_beside(value_of(data, "model", str), base, catalog()),
            artifacts=[_wanted(table, base) for table in tables],
            texts=_options(texts, {key: data[key] for key in TEXT if key in data}, TEXT, base),
            mmlu=questions,
        )
    except ValueError as error:
        raise UsageError(f"{path}: {error}", "What such a file holds is in docs/parity.md.") from error


def _beside(name: str, base: Path, known: Container[str]) -> str:
    """Return a name as it is given elsewhere: what is no known one, and lies beside the file, is a path."""
    return str(base / name) if name not in known and (base / name).exists() else name


def _wanted(table: Mapping[str, Any], base: Path) -> Wanted:
    require_known(table, "key of an artifact", ARTIFACT)
    name = value_of(table, "name", str) if "name" in table else ""
    if name and (not is_plain_name(name) or name.startswith(".") or not name.isprintable()):  # it becomes a folder's
        raise ValueError(f"an artifact cannot be called {name!r}")
    given = {kind: limits_of(value_of(table, kind, dict)) for kind in ("conversion", "compression") if kind in table}
    conversion, compression = given.get("conversion", Limits()), given.get("compression")
    checkpoint = base / value_of(table, "checkpoint", str) if "checkpoint" in table else None
    if "target" in table:
        if given:
            raise ValueError("an artifact has either a target, whose limits hold, or limits of its own")
        target = load_target(_beside(value_of(table, "target", str), base, target_names()))
        conversion, compression = target.conversion, target.compression
    elif "conversion" in table and checkpoint is None:
        raise ValueError("limits of the conversion need the checkpoint that an artifact was made from")
    return Wanted(base / value_of(table, "path", str), name, checkpoint, conversion, compression)


def _options(defaults: Options, table: Mapping[str, Any], keys: Mapping[str, str], base: Path) -> Options:
    """Return options with what a table says, checked as it is on the command line.

    Args:
        keys: key of the table -> field of the options.

    Raises:
        ValueError: a key is unknown, or a value cannot be.
    """
    require_known(table, "key", set(keys))
    fields = {field.name: field for field in dataclasses.fields(defaults)}
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, bool | list | dict):
            raise ValueError(f"{key} = {value!r} cannot be")
        try:
            kind = click.types.convert_type(fields[keys[key]].metadata["type"])
            found[keys[key]] = kind.convert(str(value), None, None)
        except click.BadParameter as error:
            raise ValueError(f"{key}: {error.message}") from error
        if isinstance(found[keys[key]], Path):
            found[keys[key]] = base / found[keys[key]]
    return dataclasses.replace(defaults, **found)
