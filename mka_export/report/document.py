"""``report.json``: checked against its published schema, ``report.schema.json`` beside this file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from mka_export.errors import MkaError

FORMAT = "mka-export/report"
VERSION = 1
SCHEMA = Path(__file__).with_name("report.schema.json")


def valid_report(report: dict[str, Any]) -> dict[str, Any]:
    """Return ``report`` as JSON can hold it, checked against the schema.

    JSON has no NaN or infinity: such a number becomes null, with a line in ``warnings`` that says which.

    Raises:
        MkaError: it does not follow the schema; the message names the first place.
    """
    lost = [f"{'.'.join(map(str, where))} was {value}: written as null" for where, value in _not_finite(report, ())]
    valid: dict[str, Any] = with_nulls(report)
    if lost:
        valid["warnings"] = [*valid.get("warnings", ()), *lost]
    if (error := best_match(_validator().iter_errors(valid))) is not None:
        where = ".".join(map(str, error.absolute_path)) or "its top level"
        raise MkaError(
            f"the report breaks its schema at {where}: {error.message[:200]}", "This is a fault of mka-export."
        )
    return valid


@cache
def _validator() -> Draft202012Validator:
    return Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))


def _is_lost(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _not_finite(value: object, where: tuple[object, ...]) -> Iterator[tuple[tuple[object, ...], object]]:
    if _is_lost(value):
        yield where, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, inner in items:
        yield from _not_finite(inner, (*where, key))


def with_nulls(value: Any) -> Any:
    """Return ``value`` as JSON can hold it: null for NaN and infinity."""
    if isinstance(value, dict):
        return {key: with_nulls(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [with_nulls(inner) for inner in value]
    return None if _is_lost(value) else value
