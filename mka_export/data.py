"""Files of data: the folders that ship with the product, and TOML and JSON that nobody vouches for."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from mka_export.errors import MkaError

MAX_TOML = 1 << 14  # bytes; the time that dotted keys take grows with the square, and these files are a page each
MAX_JSON = 1 << 24  # bytes; the largest we meet are indices of shards, 9 MB for a model of 90 000 tensors
MAX_DEPTH = 32  # of lists and tables in one another
MAX_INT = 1 << 64  # other readers of the same file have no more bits

Kind = TypeVar("Kind")
KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a table",
}


def data_folder(name: str) -> Path:
    """Return a shipped data folder: inside the package when installed, at the top level in a checkout."""
    package = Path(__file__).parent
    installed = package / name
    return installed if installed.is_dir() else package.parent / name


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        MkaError: it cannot be read or is not TOML; the message names the file.
    """
    try:
        data = tomllib.loads(_text(path, MAX_TOML))
        _require_plain(data)
    except OSError as error:
        raise MkaError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise MkaError(f"{path} is not valid TOML: {error}", "Correct the file.") from error
    return data


def load_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no JSON object, is larger or nested deeper than any file of ours, has a key twice, or
            something that we could not write again: NaN, infinity, half a surrogate pair.
    """
    try:
        data = json.loads(_text(path, MAX_JSON), object_pairs_hook=_unambiguous)
    except RecursionError as error:
        raise ValueError(str(error)) from error
    _require_plain(data)
    if not isinstance(data, dict):
        raise ValueError("it holds no JSON object")
    return data


def value_of(data: Mapping[str, Any], name: str, kind: type[Kind]) -> Kind:
    """Return what ``data`` has under ``name``; a whole number will do for a float.

    Raises:
        ValueError: there is nothing, or it is not of ``kind``.
    """
    if name not in data:
        raise ValueError(f"{name} is missing")
    value: Any = data[name]
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"{name} = {value!r} is not {KINDS[kind]}")
    return value


def _text(path: Path, limit: int) -> str:
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it is larger than {limit} bytes")
    return data.decode("utf-8")


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"it has {name!r} twice")
        found[name] = value
    return found


def _require_plain(value: object, depth: int = MAX_DEPTH) -> None:
    """Check that a value can be written again, as JSON in UTF-8, and by readers with 64-bit numbers.

    Raises:
        ValueError: it cannot.
    """
    match value:
        case dict() | list():
            if depth == 0:
                raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
            for item in value:
                _require_plain(item, depth - 1)
            if isinstance(value, dict):
                for item in value.values():
                    _require_plain(item, depth - 1)
        case str():
            value.encode("utf-8")  # half of a surrogate pair raises a ValueError
        case bool() | None:
            pass
        case int() if abs(value) < MAX_INT:
            pass
        case float() if math.isfinite(value):
            pass
        case _:
            raise ValueError(f"{value} is beyond what it may hold")
