"""What all converters do: read a target's settings, and turn whatever goes wrong into a ``ConversionError``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any, TypeVar

from mka_export.errors import ConversionError, MkaError, UnsupportedError, unknown_name
from mka_export.target import Target

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Precision = TypeVar("Precision")
Options = TypeVar("Options", bound="DataclassInstance")


def precision_of(target: Target, known: Mapping[str, Precision]) -> Precision:
    """Return the number format that ``target`` asks for.

    Raises:
        ConversionError: it is not among the known ones.
    """
    if target.precision not in known:
        raise ConversionError(f"target {target.name}: {unknown_name('precision', target.precision, known)}")
    return known[target.precision]


def options_of(target: Target, kind: type[Options]) -> Options:
    """Return the options of ``target`` as the dataclass ``kind``, whose fields are all there are.

    Raises:
        ConversionError: there is no option of that name.
    """
    known = {field.name for field in fields(kind)}
    for name in target.options:
        if name not in known:
            raise ConversionError(f"target {target.name}: {unknown_name('option', name, known)}")
    return kind(**target.options)


def require_valid(target: Target, options: object, checks: Mapping[str, tuple[bool, str]]) -> None:
    """Check options by name: whether each is valid, and what it should be.

    Raises:
        ConversionError: one is not.
    """
    for name, (valid, wanted) in checks.items():
        if not valid:
            raise ConversionError(f"target {target.name}: {name} = {getattr(options, name)!r} is not {wanted}")


def is_plain_name(value: Any) -> bool:
    """Whether a value is the name of a file, on any system, without a folder."""
    return (
        isinstance(value, str)
        and value not in ("", ".", "..")
        and Path(value).name == value == PureWindowsPath(value).name
    )


@contextmanager
def conversion_errors(out: Path) -> Iterator[None]:
    """Raise errors of the block as ``ConversionError``, and ``UnsupportedError`` as it is; ``out`` is where it writes."""
    try:
        yield
    except (ConversionError, UnsupportedError):
        raise
    except MkaError as error:
        raise ConversionError(error.what, error.remedy) from error
    except OSError as error:
        raise ConversionError(
            f"cannot write to {out}: {error.strerror or error}", "Make room, or choose another folder."
        ) from error
