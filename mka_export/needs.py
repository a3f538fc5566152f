"""What work takes of a machine, said before it starts: disk and memory."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mka_export.errors import MkaError

GB = 10**9
BROWSER_BUFFER = 2**31 - 1  # bytes: of an ArrayBuffer, and so of a file of a model there
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": GB, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Need:
    """What one stage takes at most.

    Attributes:
        kept: bytes on disk that stay.
        scratch: bytes on disk besides, while it works.
        memory: bytes of anonymous memory: that of mapped files can be given back at any time, and is not counted.
        cache: bytes that the key-value cache of an artifact takes for each token, where it runs.
    """

    kept: int = 0
    scratch: int = 0
    memory: int = 0
    cache: int = 0


def disk_peak(needs: Iterable[Need]) -> int:
    """Return the most bytes on disk at any time, with the stages one after another."""
    kept, peak = 0, 0
    for need in needs:
        peak = max(peak, kept + need.kept + need.scratch)
        kept += need.kept
    return peak


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the file system that ``folder``, which need not be there yet, is or will be on."""
    return shutil.disk_usage(existing(folder)).free


def existing(folder: Path) -> Path:
    """Return ``folder``, or the nearest folder above it that is there."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def require_room(folder: Path, nbytes: int, what: str, remedy: str) -> None:
    """Check that ``nbytes`` fit on the file system of ``folder``.

    Raises:
        MkaError: they do not; the message says how many bytes ``what`` takes and how many are free.
    """
    free = free_bytes(folder)
    if free < nbytes:
        raise MkaError(f"{what} needs {size(nbytes)} in {folder}, {size(free)} are free", remedy)


def size(nbytes: int) -> str:
    """Write a number of bytes for people: ``16.06 GB`` or ``98.2 MB``."""
    return f"{nbytes / GB:.2f} GB" if nbytes >= GB else f"{nbytes / 1e6:.1f} MB"


def parse_size(text: str) -> int:
    """Read a number of bytes, with a unit or without: ``800MB``, ``1.5 GB``, ``700MiB``.

    Raises:
        ValueError: it is none, or less than a byte.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    nbytes = float(found[1]) * UNITS.get(found[2].upper(), 0) if found else 0.0
    if not 1 <= nbytes < math.inf:
        raise ValueError(f"{text!r} is no size, as 800MB or 1.5GB are")
    return int(nbytes)
