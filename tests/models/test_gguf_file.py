"""GGUF files that lie: each is refused in a line, none is believed, none hangs."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from mka_export.errors import CheckpointError, MkaError, UnsupportedError
from mka_export.models import gguf_file
from mka_export.models.gguf_file import read_gguf

MATRIX = np.arange(4 * 64, dtype=np.float32).reshape(4, 64) / 7


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "sound.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("text", "ünïcode")
    writer.add_uint8("small", 7)
    writer.add_float64("wide", 0.1)
    writer.add_bool("yes", True)
    writer.add_array("strings", ["a", "", "ccc"])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("flags", [True, False])
    writer.add_tensor("plain", MATRIX)
    writer.add_tensor(
        "small.blocks",
        gguf.quants.quantize(MATRIX, gguf.GGMLQuantizationType.Q4_0),
        raw_dtype=gguf.GGMLQuantizationType.Q4_0,
    )
    writer.add_tensor("half", MATRIX[0].astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_reads_what_the_gguf_package_wrote(sound: Path) -> None:
    file = read_gguf(sound)
    assert file.metadata["text"] == "ünïcode"
    assert (file.metadata["small"], file.metadata["wide"], file.metadata["yes"]) == (7, 0.1, True)
    assert file.metadata["strings"] == ["a", "", "ccc"]
    assert file.metadata["numbers"] == [1, -2, 3]
    assert file.metadata["flags"] == [True, False]
    assert list(file.tensors) == ["plain", "small.blocks", "half"]
    assert [tensor.shape for tensor in file.tensors.values()] == [(4, 64), (4, 64), (64,)]
    np.testing.assert_array_equal(file.tensors["plain"].rows(1, 3), MATRIX[1:3])
    quantized = gguf.quants.quantize(MATRIX, gguf.GGMLQuantizationType.Q4_0)
    expected = gguf.quants.dequantize(quantized, gguf.GGMLQuantizationType.Q4_0)
    np.testing.assert_array_equal(file.tensors["small.blocks"].rows(0, 4), expected)
    np.testing.assert_array_equal(file.tensors["half"].rows(0, 1)[0], MATRIX[0].astype(np.float16))


def test_metadata_of_another_type_is_damage(sound: Path) -> None:
    file = read_gguf(sound)
    assert file.find("absent", int) is None
    assert file.get("small", float) == 7.0
    with pytest.raises(CheckpointError, match="text is no int"):
        file.find("text", int)
    with pytest.raises(CheckpointError, match="yes is no int"):
        file.find("yes", int)
    with pytest.raises(CheckpointError, match="lacks the key absent"):
        file.get("absent", str)
    with pytest.raises(CheckpointError, match="strings is no list of int"):
        file.list_of("strings", int)


def test_every_truncation_is_refused(sound: Path, tmp_path: Path) -> None:
    data = sound.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in range(0, len(data) - 32, 3):  # the end may be padding
        cut.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="cut.gguf"):
            read_gguf(cut)


def test_flipped_bytes_raise_nothing_else(sound: Path, tmp_path: Path) -> None:
    data = sound.read_bytes()
    header = data.index(MATRIX.tobytes())
    flipped = tmp_path / "flipped.gguf"
    rng = random.Random(3)
    refused = 0
    for _ in range(1500):
        copy = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            copy[rng.randrange(header)] = rng.choice([0, 1, 8, 9, 127, 255, rng.randrange(256)])
        flipped.write_bytes(copy)
        try:
            for tensor in read_gguf(flipped).tensors.values():
                tensor.rows(0, 1)
        except MkaError:
            refused += 1
    assert refused > 500


def header(tensors: int, keys: int, *parts: bytes, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def tensor(name: bytes, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


ENDLESS = struct.pack("<Q", 1 << 62)
BAD = {
    "empty": (b"", "no GGUF file"),
    "another format": (b"PK\x03\x04" + bytes(60), "no GGUF file"),
    "version 1": (header(0, 0, version=1), "version 1"),
    "version 77": (header(0, 0, version=77), "version 77"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "2^60 keys": (header(0, 1 << 60), "announces .* keys"),
    "2^60 tensors": (header(1 << 60, 0), "announces .* tensors"),
    "more keys than bytes": (header(0, 4, bytes(40)), "announces 4 keys"),
    "endless key": (header(0, 1, ENDLESS, bytes(8)), "past the end"),
    "endless string": (header(0, 1, string(b"k"), struct.pack("<I", 8), ENDLESS), "past the end"),
    # 43 bytes with which gguf 0.19's own reader is busy for hours
    "endless array": (
        header(0, 1, string(b"abc"), struct.pack("<II", 9, 0), b"\xff" * 8)[:43].ljust(43, b"\xff"),
        "announces|past",
    ),
    "endless array of strings": (header(0, 1, string(b"k"), struct.pack("<II", 9, 8), ENDLESS), "announces"),
    "array of arrays": (header(0, 1, string(b"k"), struct.pack("<IIQ", 9, 9, 1), bytes(16)), "array of arrays"),
    "unknown value type": (header(0, 1, string(b"k"), struct.pack("<I", 99), bytes(8)), "unknown type 99"),
    "key that is not UTF-8": (header(0, 1, string(b"\xff\xfe"), struct.pack("<IB", 0, 1)), "not UTF-8"),
    "key twice": (header(0, 2, (string(b"k") + struct.pack("<IB", 0, 1)) * 2), "stands twice"),
    "alignment 3": (header(0, 1, string(b"general.alignment"), struct.pack("<II", 4, 3)), "power of two"),
    "alignment as text": (
        header(0, 1, string(b"general.alignment"), struct.pack("<I", 8), string(b"32")),
        "power of two",
    ),
    "no dimensions": (header(1, 0, tensor(b"t", [])), "0 dimensions"),
    "2^32 - 1 dimensions": (header(1, 0, string(b"t"), struct.pack("<I", 0xFFFFFFFF), bytes(64)), "dimensions"),
    "a dimension of 0": (header(1, 0, tensor(b"t", [0, 4]), bytes(64)), "of shape"),
    "a dimension of -1": (header(1, 0, tensor(b"t", [(1 << 64) - 1]), bytes(64)), "past the end"),
    "sizes that overflow": (header(1, 0, tensor(b"t", [1 << 32, 1 << 32]), bytes(64)), "past the end"),
    "unknown tensor type": (header(1, 0, tensor(b"t", [4], kind=31), bytes(64)), "unknown type 31"),
    "row that is no whole block": (header(1, 0, tensor(b"t", [33], kind=2), bytes(64)), "cannot be Q4_0"),
    "offset off the grid": (header(1, 0, tensor(b"t", [4], offset=1), bytes(64)), "impossible offset"),
    "offset past the end": (header(1, 0, tensor(b"t", [4], offset=1 << 40), bytes(64)), "past the end"),
    "tensors over each other": (header(2, 0, tensor(b"t", [64]), tensor(b"u", [4]), bytes(512)), "impossible offset"),
    "tensor twice": (header(2, 0, tensor(b"t", [4]), tensor(b"t", [4], offset=32), bytes(512)), "stands twice"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_headers_are_refused(name: str, tmp_path: Path) -> None:
    data, message = BAD[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value)


def test_a_header_is_read_to_a_limit(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "MAX_HEADER", 100)
    with pytest.raises(CheckpointError, match="header is larger than 100 bytes"):
        read_gguf(sound)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*absent\.gguf"):
        read_gguf(tmp_path / "absent.gguf")


def test_one_file_of_several_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "part.gguf"
    path.write_bytes(header(0, 1, string(b"split.count"), struct.pack("<IH", 2, 3)))
    with pytest.raises(UnsupportedError, match=r"one of 3 files.*llama-gguf-split"):
        read_gguf(path)


def test_a_type_without_numbers_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sound: Path) -> None:
    def refuse(*_: object) -> None:
        raise NotImplementedError

    refusal: Callable[..., None] = refuse
    monkeypatch.setattr(gguf.quants, "dequantize", refusal)
    with pytest.raises(UnsupportedError, match=r"small\.blocks is stored as Q4_0"):
        read_gguf(sound).tensors["small.blocks"].rows(0, 1)
