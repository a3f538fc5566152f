"""The page for browsers"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command import type_in
from page import MAIN, fake_npm, fake_out, fake_setup

from mka_export.errors import ServeError
from mka_export.needs import BROWSER_BUFFER
from mka_export.serve.scripts import require_scripts

KINDS = "Give an output folder of mka-export, a .gguf file, or an ONNX folder."


def emptied(out: Path) -> None:
    for stage in ("gguf-q4", "onnx-int4"):
        shutil.rmtree(out / stage)


def enlarged(out: Path) -> None:
    shutil.rmtree(out / "onnx-int4")
    os.truncate(out / "gguf-q4" / "a b.gguf", BROWSER_BUFFER + 1)


CASES: dict[str, tuple[Callable[[Path], object], list[str], tuple[str, ...]]] = {
    "the folder does not exist": (shutil.rmtree, [], ("out does not exist", KINDS)),
    "the folder holds other things": (
        lambda out: (out / "manifest.json").unlink(),
        [],
        ("is no output folder of mka-export, and no artifact", KINDS),
    ),
    "the manifest is no JSON": (
        lambda out: (out / "manifest.json").write_text("["),
        [],
        ("is no output folder", KINDS),
    ),
    "there is no artifact": (emptied, [], ("holds no artifact", "Make one there")),
    "the only artifact is more than a browser holds": (
        enlarged,
        [],
        ("a b.gguf cannot be opened in a browser", "larger than 2 GiB"),
    ),
    "the page's scripts were never set up": (
        lambda out: shutil.rmtree(out.parent / "cache"),
        [],
        ("the page's scripts are not set up", "Run once: mka-export serve --setup"),
    ),
    "a script is not as it was set up": (
        lambda out: next((out.parent / "cache").glob("*/wllama.js")).write_text("fetch('https://elsewhere.example')"),
        [],
        ("are damaged: a file is not as it was", "Run again: mka-export serve --setup"),
    ),
    "the address is none": (lambda _: None, ["--host", "999.1.1.1"], ("--host 999.1.1.1 is no address",)),
    "the address is no name either": (lambda _: None, ["--host", "a" * 70], ("is no address",)),
    "the address is another machine's": (
        lambda _: None,
        ["--host", "192.0.2.200"],
        ("--host 192.0.2.200 is no address of this machine", "0.0.0.0"),
    ),
}


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output folder that could be served."""
    monkeypatch.setenv("MKA_EXPORT_CACHE", str(tmp_path / "cache"))
    fake_setup(tmp_path / "cache")
    return fake_out(tmp_path / "out")


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache without a set-up, and an npm that does what $FAKE_NPM says."""
    monkeypatch.setenv("MKA_EXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{fake_npm(tmp_path / 'bin')}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_NPM_LOG", str(tmp_path / "npm.log"))
    return tmp_path / "cache"


@pytest.mark.parametrize(("damage", "options", "words"), CASES.values(), ids=CASES)
def test_refused_serve(damage, options, words, served, refused):
    damage(served)
    refused(["serve", served, "--port", "0", *options], *words)


@pytest.mark.parametrize(
    ("name", "words"), [("notes.txt", "is a file, but no .gguf"), ("page.gguf", "it is no GGUF file")]
)
def test_refused_serve_of_a_file(name, words, served, refused):
    """a file that is no model is to be served"""
    (served.parent / name).write_text("<html>")
    refused(["serve", served.parent / name, "--port", "0"], words)


def test_refused_serve_of_nothing(refused):
    """neither an output folder nor --setup is given"""
    refused(["serve"], "there is nothing to serve", "--setup", code=2)


def test_refused_busy_port(served, refused):
    """the port is in use"""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        refused(["serve", served, "--port", port], f"port {port} is in use", "--port 0")


def test_refused_tls_without_its_package(served, refused, monkeypatch):
    """--tls is asked for, and the package that makes certificates is missing"""
    monkeypatch.setitem(sys.modules, "trustme", None)
    refused(
        ["serve", served, "--port", "0", "--tls"], "--tls needs the package trustme", "pip install 'mka-export[serve]'"
    )


@pytest.mark.parametrize("program", ["node", "npm"])
def test_refused_setup_without_npm(program, npm, refused, monkeypatch):
    """a program that the set-up needs is missing"""
    bin = npm.parent / "bin"
    (bin / program).unlink()
    monkeypatch.setenv("PATH", str(bin))
    refused(["serve", "--setup"], f"there is no {program}", "Install Node.js")
    assert list(npm.iterdir()) == []


@pytest.mark.parametrize(
    ("fate", "words"),
    [("refuse", "npm failed with exit code 1: code EINTEGRITY sha512-x is not sha512-y"), ("empty", "npm brought no")],
    ids=["a package is not of its hash", "files are missing in it"],
)
def test_refused_setup(fate, words, npm, refused, monkeypatch):
    """what npm brings is not what it should be: nothing of it stays, and a later set-up succeeds"""
    monkeypatch.setenv("FAKE_NPM", fate)
    assert "complete log" not in refused(["serve", "--setup"], words)
    assert list(npm.iterdir()) == []
    monkeypatch.delenv("FAKE_NPM")
    assert type_in("serve", "--setup").exit_code == 0
    require_scripts(npm)


def test_survived_killed_setup(npm, monkeypatch):
    """the set-up is killed while npm works: nothing stands under its final name, and it can be run again"""
    monkeypatch.setenv("FAKE_NPM", "killed")
    command = [sys.executable, "-c", MAIN, "serve", "--setup"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -9
    assert all(path.name.startswith(".") for path in npm.iterdir())
    with pytest.raises(ServeError, match="not set up"):
        require_scripts(npm)
    monkeypatch.delenv("FAKE_NPM")
    assert type_in("serve", "--setup").exit_code == 0
    assert [path.name for path in npm.iterdir()] == [require_scripts(npm).folder.name]
