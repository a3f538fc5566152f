"""Are the published files still those of the manifest?"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from mka_export.errors import WorkspaceError
from mka_export.progress import Progress
from mka_export.workspace import FORMAT, MANIFEST, RECORD, file_sha256


@dataclass(frozen=True)
class Finding:
    """A file that is not as the manifest has it.

    Attributes:
        file: path inside the output folder.
        state: ``changed``, ``missing``, or ``unknown`` where the manifest knows nothing of it.
    """

    file: str
    state: str


def verify(folder: Path, progress: Progress) -> tuple[int, list[Finding]]:
    """Compare every published file in output folder ``folder`` with the manifest.

    Files beside the stages' folders and the report are the user's own and not looked at.

    Returns:
        how many files the manifest has, and what is wrong.

    Raises:
        WorkspaceError: there is no manifest of ours, or it is damaged.
    """
    files = _manifest(folder)
    stages = {PurePosixPath(name).parent for name in files if PurePosixPath(name).name == RECORD}
    there = {
        path.relative_to(folder).as_posix()
        for stage in stages
        for path in (folder / stage).rglob("*")
        if path.is_file() or path.is_symlink()
    }
    found = [Finding(name, "unknown") for name in there - files.keys()]
    with progress.task("verify", len(files)) as task:
        for name, sha256 in files.items():
            path = folder / name
            if not path.is_file():
                found.append(Finding(name, "missing"))
            elif path.is_symlink() or file_sha256(path) != sha256:
                found.append(Finding(name, "changed"))
            task.advance()
    return len(files), sorted(found, key=lambda finding: finding.file)


def _manifest(folder: Path) -> dict[str, str]:
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WorkspaceError(f"{folder} holds no {MANIFEST}", "Give a folder that mka-export made.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise WorkspaceError(f"cannot read {path}: {error}", "The manifest is damaged: make the files again.") from None
    files = data.get("files", {}) if isinstance(data, dict) and data.get("format") == FORMAT else None
    if not isinstance(files, dict) or not all(isinstance(value, str) for value in files.values()):
        raise WorkspaceError(f"{path} is no manifest of mka-export", "Give a folder that mka-export made.")
    if outside := sorted(name for name in files if not _is_inside(name)):
        raise WorkspaceError(f"{path} names files outside its folder: {', '.join(outside[:4])}", "Do not trust it.")
    return files


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return (
        path.as_posix() == name
        and ".." not in path.parts
        and not path.is_absolute()
        and PureWindowsPath(name).as_posix() == name
        and not PureWindowsPath(name).drive
    )
