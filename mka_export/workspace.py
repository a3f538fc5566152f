"""The output folder: stages published atomically, a manifest, a lock, and resuming.

Every stage is a folder that appears under its name by one rename, with ``stage.json`` inside: what it was
made from (inputs, settings, versions), and the sha256 of each of its files. A stage whose record matches
is not made again. So whenever the work is killed, what stands under a final name is whole. A stage that takes
long keeps its finished pieces in a hidden folder beside it until it is published.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from mka_export.data import load_json, value_of
from mka_export.errors import MkaError, WorkspaceError
from mka_export.hashes import file_sha256, files_in, listed_hashes
from mka_export.progress import Progress
from mka_export.publish import clear_scratch, publish_folder, write_atomically

MANIFEST = "manifest.json"
RECORD = "stage.json"
LOCK = ".lock"
FORMAT = "mka-export/workspace"
# What is published outside the stages' folders: results as JSON, the forms of the report, the artifacts' cards.
BESIDE = ("[!.]*.json", "report.html", "junit.xml", "summary.md", "card/[!.]*/**/*")


@dataclass(frozen=True)
class Stage:
    """A published stage.

    Attributes:
        name: folder name inside the workspace.
        path: the folder.
        seconds: how long it took to make.
        reused: it was there already.
        files: relative path -> sha256.
    """

    name: str
    path: Path
    seconds: float
    reused: bool
    files: Mapping[str, str]


@dataclass
class Workspace:
    """An output folder that is ours, locked while in use.

    Use as a context manager. An empty or absent folder becomes ours; one that holds files but no manifest
    of ours is refused.

    Raises:
        WorkspaceError: it holds someone else's files, is in use by another process, or cannot be written.
    """

    path: Path
    progress: Progress
    stages: list[Stage] = field(default_factory=list)
    _lock: Any = None
    _made: dict[str, Stage] = field(default_factory=dict)  # kind and inputs -> the stage of this run that has them

    def __enter__(self) -> Workspace:
        check_ours(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / LOCK).open("w")
        except OSError as error:
            raise WorkspaceError(f"cannot write to {self.path}: {error.strerror}", "Choose another --out.") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise WorkspaceError(
                f"{self.path} is in use by another mka-export", "Wait for it, or choose another --out."
            ) from error
        if not (self.path / MANIFEST).exists():
            self.write_manifest({})
        for folder in (self.path, *(p.parent for p in self.path.rglob(".*.making"))):  # stages may lie deeper
            clear_scratch(folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()

    def stage(
        self, name: str, inputs: Mapping[str, Any], make: Callable[[Path, Path], None], kind: str | None = None
    ) -> Stage:
        """Return stage ``name``, made by ``make(folder, pieces)`` unless it is there with the same ``inputs``.

        Args:
            inputs: JSON values that the result depends on, versions and fingerprints included.
            make: writes the stage's files into the existing empty ``folder``. What it leaves in ``pieces`` is
                there again when the work is killed and goes on with the same inputs.
            kind: of what several stages may be. One whose inputs another of this run has too is copied from it.
        """
        final = self.path / name
        inputs = json.loads(json.dumps(inputs, sort_keys=True))
        stage, why = _existing(final, name, inputs)
        same = json.dumps([kind, inputs])
        if stage is None:
            if final.exists():
                self.progress.say(f"{name}: made again, because {why}")
            twin = self._made.get(same)
            if twin in self.stages:  # it was not replaced since
                self.progress.say(f"{name}: the same as {twin.name}, copied")
                make = partial(_copy, twin)
            start = time.monotonic()
            pieces = kept_pieces(final, inputs)
            with publish_folder(final) as folder:
                try:
                    make(folder, pieces)
                except MkaError:
                    if not any(pieces.glob("*.seal")):
                        shutil.rmtree(pieces)
                    raise
                seconds = round(time.monotonic() - start, 2)
                files = {name: file_sha256(path) for name, path in files_in(folder).items()}
                write_atomically(
                    folder / RECORD, {"format": FORMAT, "inputs": inputs, "seconds": seconds, "files": files}
                )
            shutil.rmtree(pieces)
            stage = Stage(name, final, seconds, False, files)
        else:
            self.progress.say(f"{name}: there already, kept")
            shutil.rmtree(pieces_folder(final), ignore_errors=True)  # the run that published it was killed
        if kind is not None:
            self._made[same] = stage
        self.stages = [*(other for other in self.stages if other.name != name), stage]
        return stage

    def kept(self, name: str, inputs: Mapping[str, Any]) -> Stage | None:
        """Return stage ``name`` if an earlier run made it with the same ``inputs``."""
        return _existing(self.path / name, name, json.loads(json.dumps(inputs, sort_keys=True)))[0]

    def write_manifest(self, contents: Mapping[str, Any]) -> None:
        """Write ``manifest.json``: ``contents``, and the sha256 of every published file, of earlier runs too."""
        beside = {path for pattern in BESIDE for path in self.path.glob(pattern) if path.is_file()}
        beside.discard(self.path / MANIFEST)
        files = {path.relative_to(self.path).as_posix(): file_sha256(path) for path in sorted(beside)}
        for record in sorted(self.path.rglob(RECORD)):
            folder = record.parent.relative_to(self.path)
            known = read_record(record.parent)
            if known is not None and not any(part.startswith(".") for part in folder.parts):
                for name, sha256 in {**known["files"], RECORD: file_sha256(record)}.items():
                    files[(folder / name).as_posix()] = sha256
        write_atomically(self.path / MANIFEST, {"format": FORMAT, **contents, "files": files})


def check_ours(path: Path) -> None:
    """Check, without writing, that ``path`` is absent, empty, or a workspace.

    Raises:
        WorkspaceError: it is a file, or holds files that are not ours.
    """
    if path.exists() and not path.is_dir():
        raise WorkspaceError(f"{path} is a file", "Choose another --out.")
    if not path.is_dir() or ((path / MANIFEST).is_file() and _format(path / MANIFEST) == FORMAT):
        return
    others = sorted(p.name for p in path.iterdir() if p.name != LOCK and not p.name.startswith(f".{MANIFEST}"))
    if others:
        raise WorkspaceError(
            f"{path} holds files that mka-export did not make ({', '.join(others[:3])})",
            "Choose another --out; nothing was changed.",
        )


def published(folder: Path, name: str) -> Stage:
    """Return the stage ``name`` of an output folder, whatever it was made from.

    Raises:
        WorkspaceError: it is not there as it was made.
    """
    record = read_record(folder / name)
    stage, why = _existing(folder / name, name, record["inputs"] if record else {})
    if stage is None:
        raise WorkspaceError(f"{folder / name} cannot be used: {why}", "Run the command that made it again.")
    return stage


def read_record(path: Path) -> dict[str, Any] | None:
    """Return the record of the stage in folder ``path``, or None if it has none that is whole."""
    try:
        record = load_json(path / RECORD)
        whole = record.get("format") == FORMAT and value_of(record, "seconds", float) >= 0
        return {**record, "inputs": value_of(record, "inputs", dict), "files": listed_hashes(record)} if whole else None
    except (OSError, ValueError):
        return None


def _existing(final: Path, name: str, inputs: Mapping[str, Any]) -> tuple[Stage | None, str]:
    """Return the stage if it stands with these inputs and its bytes are unchanged, else why not."""
    record = read_record(final)
    if record is None:
        return None, "its record is missing or damaged"
    if record["inputs"] != inputs:
        changed = sorted(k for k in {*inputs, *record["inputs"]} if inputs.get(k) != record["inputs"].get(k))
        return None, f"these changed: {', '.join(changed)}"
    there = files_in(final)
    for file, sha256 in record["files"].items():
        if file not in there or not there[file].is_file() or file_sha256(there[file]) != sha256:
            return None, f"{file} is not as it was made"
    return Stage(name, final, record["seconds"], True, record["files"]), ""


def _copy(stage: Stage, folder: Path, pieces: Path) -> None:
    for name in stage.files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(stage.path / name, folder / name)


def kept_pieces(final: Path, inputs: Mapping[str, Any]) -> Path:
    """Return the folder of finished pieces of a stage, or of several, emptied if it is of other inputs (JSON values)."""
    folder, record = pieces_folder(final), "inputs.json"
    try:
        same = load_json(folder / record) == inputs
    except (OSError, ValueError):
        same = False
    if not same:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_atomically(folder / record, inputs)
    return folder


def pieces_folder(final: Path) -> Path:
    """Return where the finished pieces of the stage in folder ``final`` are kept until it is published."""
    return final.with_name(f".{final.name}.pieces")


def _format(manifest: Path) -> str | None:
    try:
        return value_of(load_json(manifest), "format", str)
    except (OSError, ValueError):
        return None
