"""Files and folders that appear under their names whole: written beside them, on disk, then renamed; and seals for them."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mka_export.data import load_json, value_of
from mka_export.hashes import file_sha256

if TYPE_CHECKING:
    from numpy.typing import NDArray


def clear_scratch(folder: Path) -> None:
    """Remove what killed runs left half-made in ``folder``, which nobody else may be using."""
    for left in folder.glob(".*.making"):
        shutil.rmtree(left, ignore_errors=True)
    for left in folder.glob(".*.writing"):
        left.unlink(missing_ok=True)


@contextmanager
def publish_folder(final: Path) -> Iterator[Path]:
    """Yield a new folder beside ``final`` that takes that name, whole and on disk, when the block ends.

    An older ``final`` is replaced. If the block raises, nothing of it stays.
    """
    making = final.with_name(f".{final.name}.making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    try:
        yield making
        mask = os.umask(0)
        os.umask(mask)
        for path in sorted(making.rglob("*"), reverse=True):
            if path.is_file():  # safetensors makes files that only their owner can read
                path.chmod(0o666 & ~mask)
            _sync(path)
        _sync(making)
        if final.exists():
            # Two renames and not one: a kill between them leaves the stage absent, never half there.
            old = final.with_name(f".{final.name}.old.making")
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
            making.rename(final)
            shutil.rmtree(old, ignore_errors=True)
        else:
            making.rename(final)
        _sync(final.parent)
    except OSError as error:
        _name(error, final)
        raise
    finally:
        shutil.rmtree(making, ignore_errors=True)


@contextmanager
def publish_file(final: Path) -> Iterator[Path]:
    """Yield a path beside ``final``; the file written there takes that name, whole and on disk, when the block ends."""
    writing = final.with_name(f".{final.name}.writing")
    try:
        yield writing
        _sync(writing)
        writing.replace(final)
    except OSError as error:
        _name(error, final)
        raise
    finally:
        writing.unlink(missing_ok=True)


def write_atomically(path: Path, data: object) -> None:
    """Write ``data`` as JSON so that ``path`` holds either the old or the new contents, never a part."""
    with publish_file(path) as writing:
        write_json(writing, data)


def write_json(path: Path, data: object) -> None:
    """Write ``data`` as indented JSON with a final newline; NaN and infinity are refused."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write an ``.npy``; numpy's own writing does not say that the disk is full.

    Raises:
        OSError: with the number of what went wrong.
    """
    import numpy as np  # --help need not wait for it

    made = io.BytesIO()
    np.save(made, array, allow_pickle=False)
    path.write_bytes(made.getbuffer())


def seal(path: Path, about: Mapping[str, Any]) -> None:
    """Record beside a finished piece that it is whole, and what it is."""
    write_atomically(_seal(path), {"about": about, "sha256": file_sha256(path)})


def sealed(path: Path) -> dict[str, Any] | None:
    """Return what a piece is, or None where it is not there as it was sealed."""
    try:
        record = load_json(_seal(path))
        about = value_of(record, "about", dict)
        return about if record.get("sha256") == file_sha256(path) else None
    except (OSError, ValueError):
        return None


def _seal(path: Path) -> Path:
    return path.with_name(f"{path.name}.seal")


def _name(error: OSError, path: Path) -> None:
    """Give an error of writing the file name that the system leaves out when the disk is full."""
    if error.errno is not None and error.filename is None:
        error.filename = str(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
