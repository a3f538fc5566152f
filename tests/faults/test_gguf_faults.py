"""GGUF input"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from command import type_in
from fault_tools import DONE, LOOSE, MERGE, SMALL, contents


def header(tensors: int, keys: int, *parts: bytes, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def tensor(name: bytes, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def number(key: bytes, value: int) -> Callable[[bytes], bytes]:
    """Set a 32-bit value of a sound file."""

    def edit(sound: bytes) -> bytes:
        at = sound.index(string(key)) + 8 + len(key) + 4
        return sound[:at] + struct.pack("<I", value) + sound[at + 4 :]

    return edit


ENDLESS = struct.pack("<Q", 1 << 62)
CASES: dict[str, tuple[bytes | Callable[[bytes], bytes], tuple[str, ...]]] = {
    "the file is empty": (b"", ("no GGUF file",)),
    "the magic is wrong": (lambda sound: b"GGUX" + sound[4:], ("no GGUF file",)),
    "the version is 1": (header(0, 0, version=1), ("version 1",)),
    "the version is 77": (header(0, 0, version=77), ("version 77",)),
    "it is big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), ("big-endian", "llama.cpp")),
    "it announces 2^60 keys": (header(0, 1 << 60), ("announces", "keys")),
    "it announces 2^60 tensors": (header(1 << 60, 0), ("announces", "tensors")),
    "a string ends past the end": (header(0, 1, string(b"k"), struct.pack("<I", 8), ENDLESS), ("past the end",)),
    "an array of 43 bytes has 2^64 items": (
        header(0, 1, string(b"abc"), struct.pack("<II", 9, 0))[:43].ljust(43, b"\xff"),
        ("damaged",),
    ),
    "an array holds arrays": (
        header(0, 1, string(b"k"), struct.pack("<IIQ", 9, 9, 1), bytes(16)),
        ("k is an array of arrays",),
    ),
    "a dimension is negative": (header(1, 0, tensor(b"t", [(1 << 64) - 1]), bytes(64)), ("tensor t",)),
    "a dimension is 0": (header(1, 0, tensor(b"t", [0, 4]), bytes(64)), ("tensor t",)),
    "a size overflows": (header(1, 0, tensor(b"t", [1 << 32, 1 << 32]), bytes(64)), ("tensor t",)),
    "a tensor has 2^32 - 1 dimensions": (header(1, 0, string(b"t"), struct.pack("<I", 0xFFFFFFFF), bytes(64)), ("t",)),
    "a tensor lies past the end": (header(1, 0, tensor(b"t", [4], offset=1 << 40), bytes(64)), ("past the end",)),
    "two tensors overlap": (header(2, 0, tensor(b"t", [64]), tensor(b"u", [4]), bytes(512)), ("tensor u", "offset")),
    "two tensors have one name": (
        header(2, 0, tensor(b"t", [4]), tensor(b"t", [4], offset=32), bytes(512)),
        ("tensor t stands twice",),
    ),
    "the data are truncated": (lambda sound: sound[: len(sound) // 2], ("past the end of the file",)),
    "the header is truncated": (lambda sound: sound[:100], ("damaged",)),
    "it announces no layers": (number(b"llama.block_count", 0), ("block_count",)),
    "it announces a million layers": (number(b"llama.block_count", 1_000_000), ("announces 1000000 layers",)),
    "it announces more layers than it has": (number(b"llama.block_count", 7), ("lacks", "model.layers.5")),
    "it announces no heads": (number(b"llama.attention.head_count", 0), ("head_count",)),
}


@pytest.fixture(scope="session")
def sound(published: Path) -> bytes:
    (gguf,) = (published / "gguf-q8").glob("*.gguf")
    return gguf.read_bytes()


@pytest.fixture
def damaged(sound: bytes, tmp_path: Path) -> Callable[[str], Path]:
    def make(fault: str) -> Path:
        edit, path = CASES[fault][0], tmp_path / "bad.gguf"
        path.write_bytes(edit if isinstance(edit, bytes) else edit(sound))
        return path

    return make


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MKA_EXPORT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("fault", CASES)
def test_refused(fault, damaged, refused):
    line = refused([damaged(fault), *MERGE, "--to", "gguf-q8", "--out", "{out}", *SMALL, "--quiet"], *CASES[fault][1])
    assert "bad.gguf" in line


@pytest.mark.parametrize("fault", ["it announces a million layers", "the data are truncated", "the file is empty"])
def test_survived_check(fault, damaged, pico_llama, tmp_path):
    """a damaged file is checked as an artifact: a verdict, not a crash"""
    artifact, out = damaged(fault), tmp_path / "out"
    before = contents(tmp_path)
    result = type_in("check", artifact, "--against", pico_llama, "--out", out, *SMALL, "--quiet")
    assert result.exit_code == 3, result.output
    assert "FAIL" in result.stdout
    assert "bad.gguf" in result.stdout
    assert "Traceback" not in result.output
    assert {name: data for name, data in contents(tmp_path).items() if not name.startswith("out/")} == before
    (told,) = json.loads((out / "report.json").read_text())["targets"]
    assert told["error"]
    assert json.loads((out / "parity" / "bad" / "parity.json").read_text())["failures"] == [told["error"]]


def test_survived_sound(sound, tmp_path):
    """a sound file is read, and merged again"""
    (tmp_path / "good.gguf").write_bytes(sound)
    run = [*MERGE, "--to", "gguf-q8", "--out", tmp_path / "out", *SMALL, *LOOSE, "--quiet"]
    assert type_in(tmp_path / "good.gguf", *run).exit_code in DONE
