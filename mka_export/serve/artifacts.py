"""The artifacts of an output folder that a browser can open, and why it cannot open the others."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mka_export.data import load_json, value_of
from mka_export.errors import ServeError
from mka_export.hashes import files_in
from mka_export.needs import BROWSER_BUFFER
from mka_export.workspace import FORMAT, MANIFEST, RECORD

ONNX_CONFIG = "genai_config.json"  # in every ONNX folder
KINDS = "Give an output folder of mka-export, a .gguf file, or an ONNX folder."


@dataclass(frozen=True)
class Servable:
    """An artifact that is listed on the page.

    Attributes:
        name: of its file or folder.
        target: the stage that made it; empty where the artifact itself was named.
        kind: what opens it.
        files: name inside the artifact -> file. A GGUF file has one, under its own name.
        obstacle: why it is not offered; empty where it is.
    """

    name: str
    target: str
    kind: Literal["gguf", "onnx"]
    files: Mapping[str, Path]
    obstacle: str

    @property
    def nbytes(self) -> int:
        """Size of all files together."""
        return sum(path.stat().st_size for path in self.files.values())

    @property
    def tag(self) -> str:
        """Return a name that changes with the files, so that no browser takes an older one for it."""
        states = {name: identity(path.stat()) for name, path in sorted(self.files.items())}
        return hashlib.sha256(f"{self.kind} {self.name!r} {states}".encode()).hexdigest()[:16]


def identity(state: os.stat_result) -> tuple[int, ...]:
    """Return what tells whether a file is still the one that was looked at."""
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


def find_artifacts(path: Path) -> list[Servable]:
    """Find what can be listed in an output folder, or the one artifact that ``path`` is.

    Raises:
        ServeError: ``path`` is missing, is neither, or holds no artifact.
    """
    if not path.exists():
        raise ServeError(f"{path} does not exist", KINDS)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ServeError(f"{path} is a file, but no .gguf", KINDS)
        return [_gguf(path, path.parent, "")]
    if (path / ONNX_CONFIG).is_file():
        return [_onnx(path, path, "")]
    if not _is_ours(path):
        raise ServeError(f"{path} is no output folder of mka-export, and no artifact", KINDS)
    found = [artifact for stage in _stages(path) for artifact in _in_stage(stage, path)]
    if not found:
        raise ServeError(f"{path} holds no artifact", "Make one there: mka-export convert MODEL --to gguf-q4.")
    return found


def _is_ours(folder: Path) -> bool:
    try:
        return value_of(load_json(folder / MANIFEST), "format", str) == FORMAT
    except (OSError, ValueError):
        return False


def _stages(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if not path.name.startswith(".") and not path.is_symlink() and (path / RECORD).is_file():
            yield path


def _in_stage(stage: Path, root: Path) -> Iterator[Servable]:
    for path in sorted(stage.iterdir()):
        if _own(path, root) is None:
            continue
        if path.suffix == ".gguf" and path.is_file():
            yield _gguf(path, root, stage.name)
        elif path.is_dir() and (path / ONNX_CONFIG).is_file():
            yield _onnx(path, root, stage.name)


def _own(path: Path, root: Path) -> Path | None:
    """Return where ``path`` really is, or None if a link takes it out of ``root``."""
    real = path.resolve()
    return real if real.is_relative_to(root.resolve()) else None


def _gguf(path: Path, root: Path, target: str) -> Servable:
    real = _own(path, root) if target else path.resolve()  # a link that the user named is meant
    assert real is not None
    with real.open("rb") as file:
        obstacle = "" if file.read(4) == b"GGUF" else "it is no GGUF file"
    files = {path.name: real}
    return Servable(path.name, target, "gguf", files, obstacle or _too_large(files))


def _onnx(folder: Path, root: Path, target: str) -> Servable:
    inside = {name: _own(path, root) for name, path in files_in(folder).items() if not _hidden(name)}
    files = {name: real for name, real in inside.items() if real is not None and real.is_file()}
    return Servable(folder.resolve().name, target, "onnx", files, _unreadable(files) or _too_large(files))


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _unreadable(files: Mapping[str, Path]) -> str:
    if not any(name.startswith("onnx/") and name.endswith(".onnx") for name in files):
        return "it has no graph in onnx/"
    try:
        value_of(load_json(files["config.json"]), "transformers.js_config", dict)
    except (KeyError, OSError, ValueError):
        return "its config.json has no settings for transformers.js"
    return ""


def _too_large(files: Mapping[str, Path]) -> str:
    large = [name for name, path in files.items() if path.stat().st_size > BROWSER_BUFFER]
    return f"{large[0]} is larger than 2 GiB, more than a browser holds in one buffer" if large else ""
