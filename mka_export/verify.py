"""Are the published files still those of the manifest?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mka_export.data import load_json
from mka_export.errors import WorkspaceError
from mka_export.hashes import file_sha256, files_in, listed_hashes
from mka_export.progress import Progress
from mka_export.workspace import FORMAT, MANIFEST, RECORD


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
    files, there = _manifest(folder), files_in(folder)
    stages = {PurePosixPath(name).parent for name in files if PurePosixPath(name).name == RECORD}
    unknown = (name for name in there if name not in files and not stages.isdisjoint(PurePosixPath(name).parents))
    found = [Finding(name, "unknown") for name in unknown]
    with progress.task("verify", len(files)) as task:
        for name, sha256 in files.items():
            if name not in there:
                found.append(Finding(name, "missing"))
            elif there[name].is_symlink() or file_sha256(there[name]) != sha256:
                found.append(Finding(name, "changed"))
            task.advance()
    return len(files), sorted(found, key=lambda finding: finding.file)


def _manifest(folder: Path) -> dict[str, str]:
    path = folder / MANIFEST
    try:
        data = load_json(path)
    except FileNotFoundError:
        raise WorkspaceError(f"{folder} holds no {MANIFEST}", "Give a folder that mka-export made.") from None
    except (OSError, ValueError) as error:
        raise WorkspaceError(f"cannot read {path}: {error}", "The manifest is damaged: make the files again.") from None
    try:
        if data.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        return listed_hashes(data)
    except ValueError as error:
        raise WorkspaceError(f"{path} is no manifest of mka-export: {error}", "Do not trust this folder.") from None
