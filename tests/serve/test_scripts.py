"""The set-up of the page's scripts: whole or not there, whatever becomes of npm."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from page import fake_npm

from mka_export.errors import ServeError
from mka_export.progress import Progress
from mka_export.serve.scripts import LOCKED, PACKAGES, PARTS, require_scripts, set_up


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What was asked of npm, one line each time."""
    log = tmp_path / "npm.log"
    monkeypatch.setenv("PATH", f"{fake_npm(tmp_path / 'bin')}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_NPM_LOG", str(log))
    return log


def test_set_up_once(npm, tmp_path):
    made = set_up(tmp_path / "cache", Progress(quiet=True))
    assert made == set_up(tmp_path / "cache", Progress(quiet=True)) == require_scripts(tmp_path / "cache")
    assert made.versions == dict.fromkeys(PACKAGES, "1.2.3")
    assert {path.name for path in made.folder.iterdir()} == {*PARTS, "scripts.json"}
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [made.folder.name]
    (line,) = npm.read_text().splitlines()
    assert line.startswith("ci --ignore-scripts ")


def test_every_package_is_held_by_its_hash():
    packages = json.loads((LOCKED / "package-lock.json").read_text())["packages"]
    wanted = packages.pop("")
    assert wanted["dependencies"]["@huggingface/transformers"] == "4.3.1"
    assert wanted["dependencies"]["@wllama/wllama"] == "3.13.0"
    assert wanted["dependencies"] == json.loads((LOCKED / "package.json").read_text())["dependencies"]
    assert all(package["integrity"].startswith("sha512-") for package in packages.values())
    heavy = [packages[f"node_modules/{name}"]["name"] for name in ("onnxruntime-node", "sharp")]
    assert not {"onnxruntime-node", "sharp"} & set(heavy)  # for Node only: something tiny stands for them


@pytest.mark.parametrize("damage", ["changed", "missing", "record"])
def test_damage_is_found_and_mended(damage, npm, tmp_path):
    made = set_up(tmp_path / "cache", Progress(quiet=True))
    script = made.folder / "wllama.js"
    if damage == "changed":
        script.write_text("fetch('https://elsewhere.example')")
    elif damage == "missing":
        script.unlink()
    else:
        (made.folder / "scripts.json").write_text('{"files": {"../wllama.js": ""}}')
    with pytest.raises(ServeError, match="serve --setup"):
        require_scripts(tmp_path / "cache")
    assert set_up(tmp_path / "cache", Progress(quiet=True)) == made
    assert script.read_text() == "// @wllama/wllama/esm/index.min.js\n"
