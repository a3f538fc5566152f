"""GGUF files unpacked into checkpoints, kept in the cache."""

from __future__ import annotations

from pathlib import Path

from mka_export import __version__
from mka_export.errors import MkaError
from mka_export.models.checkpoint import Checkpoint
from mka_export.models.gguf_source import gguf_to_checkpoint
from mka_export.progress import Progress
from mka_export.publish import clear_scratch, publish_folder

SEAL = "fingerprint.txt"  # beside the checkpoint's files: what Checkpoint.fingerprint was when they were made


def unpacked_folder(sha256: str, cache: Path) -> Path:
    """Return where ``checkpoint_from_gguf`` puts the checkpoint of the file with this sha256."""
    return cache / "checkpoints" / f"{sha256}-{__version__}"


def checkpoint_from_gguf(file: Path, sha256: str, cache: Path, progress: Progress) -> Path:
    """Return the checkpoint made from ``file``, made now unless the cache holds it whole.

    Args:
        file: the GGUF file.
        sha256: of that file. Folders are named by it and by our version, which may unpack differently.
        cache: the cache folder, which nobody else may be using.
        progress: where to say what is done.

    Raises:
        CheckpointError, UnsupportedError: the file is damaged, or of a kind we do not read.
        OSError: the cache cannot be written to.
    """
    final = unpacked_folder(sha256, cache)
    if final.is_dir():
        if _is_sound(final):
            return final
        progress.say(f"{final} is damaged: unpacking {file.name} again")
    clear_scratch(final.parent)
    with publish_folder(final) as folder:
        gguf_to_checkpoint(file, folder, progress)
        (folder / SEAL).write_text(Checkpoint.open(folder).fingerprint + "\n", encoding="utf-8")
    return final


def _is_sound(folder: Path) -> bool:
    try:
        return (folder / SEAL).read_text(encoding="utf-8").strip() == Checkpoint.open(folder).fingerprint
    except (OSError, MkaError):
        return False
