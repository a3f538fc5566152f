"""The page's libraries, transformers.js and wllama: brought once by npm, at pinned versions, into the cache."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mka_export.data import load_json, value_of
from mka_export.errors import ServeError
from mka_export.hashes import file_sha256, listed_hashes
from mka_export.models.sources import using_cache
from mka_export.progress import Progress
from mka_export.publish import clear_scratch, publish_folder, write_json

LOCKED = Path(__file__).parent / "npm"  # package.json and its lock file, with the hash of every package
RECORD = "scripts.json"
SETUP = "mka-export serve --setup"
PARTS = {  # name on the page -> file that npm brings
    "transformers.js": "@huggingface/transformers/dist/transformers.min.js",
    # The build without WebGPU: half the size of transformers.js' default, and what that takes in older Safaris.
    "ort-wasm-simd-threaded.mjs": "onnxruntime-web/dist/ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm": "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
    "wllama.js": "@wllama/wllama/esm/index.min.js",
    "wllama.wasm": "@wllama/wllama/esm/wasm/wllama.wasm",
    # For browsers without memories of 64 bits, as Safari is.
    "wllama-compat.js": "@wllama/wllama-compat/wasm/wllama.js",
    "wllama-compat.wasm": "@wllama/wllama-compat/wasm/wllama.wasm",
}
PACKAGES = {
    "transformers.js": "@huggingface/transformers",
    "onnxruntime-web": "onnxruntime-web",
    "wllama": "@wllama/wllama",
}


@dataclass(frozen=True)
class Scripts:
    """The libraries on this machine.

    Attributes:
        folder: where they are; its name changes with their versions.
        versions: library -> version.
    """

    folder: Path
    versions: Mapping[str, str]


def require_scripts(cache: Path) -> Scripts:
    """Return what ``set_up`` published.

    Raises:
        ServeError: nothing, or files that are not as they were then.
    """
    folder = _place(cache)
    try:
        record = load_json(folder / RECORD)
        hashes, versions = listed_hashes(record), value_of(record, "versions", dict)
        if set(hashes) != set(PARTS) or any(file_sha256(folder / name) != sha256 for name, sha256 in hashes.items()):
            raise ValueError("a file is not as it was")
        return Scripts(folder, {name: value_of(versions, name, str) for name in PACKAGES})
    except FileNotFoundError:
        raise ServeError("the page's scripts are not set up", f"Run once: {SETUP}") from None
    except (OSError, ValueError) as error:
        raise ServeError(f"the page's scripts in {folder} are damaged: {error}", f"Run again: {SETUP}") from error


def set_up(cache: Path, progress: Progress) -> Scripts:
    """Have npm bring the libraries, check them against the lock file, and publish those the page needs.

    Raises:
        ServeError: there is no npm, or it fails.
        SourceError: the cache cannot be written to.
    """
    with using_cache(cache, progress):
        try:
            scripts = require_scripts(cache)
            progress.say(f"set up already: {scripts.folder}")
            return scripts
        except ServeError:
            pass  # nothing is there yet, or something is wrong with it
        for program in ("node", "npm"):
            if shutil.which(program) is None:
                raise ServeError(f"there is no {program}", "Install Node.js, version 18 or later, then run this again.")
        clear_scratch(cache)
        _make(cache, progress)
        scripts = require_scripts(cache)
    progress.say(f"set up: {', '.join(f'{name} {version}' for name, version in scripts.versions.items())}")
    return scripts


def _place(cache: Path) -> Path:
    return cache / f"page-{file_sha256(LOCKED / 'package-lock.json')[:16]}"


def _make(cache: Path, progress: Progress) -> None:
    # npm works in a folder of its own name: one that outlived a killed set-up cannot write into the next one's.
    with (
        tempfile.TemporaryDirectory(prefix=".npm-", suffix=".making", dir=cache, ignore_cleanup_errors=True) as work,
        publish_folder(_place(cache)) as folder,
    ):
        for name in ("package.json", "package-lock.json"):
            shutil.copyfile(LOCKED / name, Path(work) / name)
        progress.say("fetching the page's scripts with npm ...")
        _npm(Path(work))
        modules = Path(work) / "node_modules"
        for name, part in PARTS.items():
            if not (modules / part).is_file():
                raise ServeError(f"npm brought no {part}")
            shutil.copyfile(modules / part, folder / name)
        versions = {name: _version(modules / package) for name, package in PACKAGES.items()}
        write_json(folder / RECORD, {"versions": versions, "files": {n: file_sha256(folder / n) for n in PARTS}})


def _npm(folder: Path) -> None:
    # Scripts of packages are not run; every package is checked against the hash in the lock file.
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier", "--loglevel=error"]
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line.removeprefix("npm error ") for line in done.stderr.splitlines()]
        said = " ".join(line for line in lines if not line.startswith("A complete log"))
        raise ServeError(f"npm failed with exit code {done.returncode}: {said[:400]}", f"Run again: {SETUP}")


def _version(package: Path) -> str:
    try:
        data: dict[str, Any] = json.loads((package / "package.json").read_text(encoding="utf-8"))
        return value_of(data, "version", str)
    except (OSError, ValueError) as error:
        raise ServeError(f"npm brought no {package.name} of a known version: {error}") from error
