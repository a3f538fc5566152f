"""Hashes of files, and lists of them that come from somewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from mka_export.data import value_of


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def files_in(folder: Path) -> dict[str, Path]:
    """Return every file below ``folder``, and every link, which is not followed: name inside ``folder`` -> path."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    return {path.relative_to(folder).as_posix(): path for path in found}


def listed_hashes(data: Mapping[str, Any]) -> dict[str, str]:
    """Return the ``files`` of a manifest or of a stage's record: name inside its folder -> sha256.

    Raises:
        ValueError: there are none, or one is not inside.
    """
    files = value_of(data, "files", dict)
    if outside := sorted(name for name in files if not _is_inside(name)):
        raise ValueError(f"it names files outside its folder: {', '.join(outside[:4])}")
    return {name: value_of(files, name, str) for name in files}


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return (
        path.as_posix() == name
        and ".." not in path.parts
        and not path.is_absolute()
        and PureWindowsPath(name).as_posix() == name
        and not PureWindowsPath(name).drive
    )
