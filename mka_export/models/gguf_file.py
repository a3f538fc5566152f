"""Open a GGUF file that nobody vouches for: every count and length is checked before it is believed.

The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3,
little-endian. The header is read here rather than with ``gguf.GGUFReader``, which trusts its counts (a
file of 43 bytes can keep it busy for hours) and keeps several arrays for every token of a vocabulary.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from mka_export.errors import CheckpointError, UnsupportedError

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # version 1 had 32-bit counts
MAX_DIMS = 4
MAX_ITEMS = 1 << 22  # of one array, and of tensors or keys: far above any vocabulary
MAX_HEADER = 100 << 20  # bytes, as safetensors has it; the largest vocabularies take some 20 MB

SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "?",
}

Kind = TypeVar("Kind", bool, int, float, str)


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor, still in the file.

    Attributes:
        name: as llama.cpp calls it.
        shape: rows first, as in PyTorch (the file has it the other way round).
        type: how the numbers are stored.
        data: (rows, bytes of a row), mapped from the file; rows are all dimensions but the last.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    data: NDArray[np.uint8]

    def rows(self, first: int, last: int) -> NDArray[np.float32]:
        """Return the numbers of rows ``first`` to ``last`` (excluded): (last - first, columns).

        Raises:
            UnsupportedError: the gguf package cannot turn this type into numbers.
        """
        piece = self.data[first:last]
        if self.type in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            piece = piece.view(np.float32 if self.type == GGMLQuantizationType.F32 else np.float16)
        try:
            return np.require(gguf.quants.dequantize(piece, self.type), np.float32, "W")
        except NotImplementedError:
            raise UnsupportedError(f"tensor {self.name} is stored as {self.type.name}, which cannot be read") from None


@dataclass(frozen=True)
class GGUFFile:
    """An opened GGUF file.

    Attributes:
        path: where it is.
        metadata: key -> value: numbers, strings, booleans, and lists of them.
        tensors: name -> tensor, in the order of the file.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]

    def find(self, key: str, kind: type[Kind]) -> Kind | None:
        """Return a value of the metadata, or None where there is none.

        Raises:
            CheckpointError: it is not of ``kind`` (an integer will do for a float), or NaN or infinite.
        """
        value = self.metadata.get(key)
        if value is None:
            return None
        if kind is float and type(value) is int:
            return kind(value)
        if type(value) is not kind or (type(value) is float and not math.isfinite(value)):
            raise CheckpointError(f"{self.path}: {key} is no {kind.__name__}", "The file is damaged: fetch it again.")
        return value

    def get(self, key: str, kind: type[Kind]) -> Kind:
        """Return a value of the metadata.

        Raises:
            CheckpointError: there is none, or it is not of ``kind``.
        """
        value = self.find(key, kind)
        if value is None:
            raise CheckpointError(f"{self.path} lacks the key {key}", "Use a complete file.")
        return value

    def list_of(self, key: str, kind: type[Kind]) -> list[Kind]:
        """Return a list of the metadata; empty where there is none.

        Raises:
            CheckpointError: it is no list, or holds something that is not of ``kind``.
        """
        value = self.metadata.get(key, [])
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            raise CheckpointError(
                f"{self.path}: {key} is no list of {kind.__name__}", "The file is damaged: fetch it again."
            )
        return value


def read_gguf(path: Path) -> GGUFFile:
    """Open a GGUF file; tensors stay on disk, mapped.

    Raises:
        CheckpointError: it is no GGUF file, or damaged; the message says where.
        UnsupportedError: it is one of several files that belong together.
    """
    try:
        size = path.stat().st_size
        data = np.asarray(np.memmap(path, np.uint8, "r")) if size else np.empty(0, np.uint8)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    metadata, tensors = _Header(path, data).read()
    file = GGUFFile(path, metadata, tensors)
    if (parts := file.find("split.count", int) or 0) > 1:
        raise UnsupportedError(f"{path} is one of {parts} files", "Join them with llama-gguf-split --merge.")
    return file


class _Header:
    """A cursor over the header that never goes past the end of the file."""

    def __init__(self, path: Path, data: NDArray[np.uint8]) -> None:
        self.path, self.data, self.view, self.at = path, data, data.data, 0

    def read(self) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
        if bytes(self.view[:4]) != MAGIC:
            raise CheckpointError(f"{self.path} is no GGUF file: it does not begin with GGUF")
        self.at = 4
        version = self.scalar("I", "version")
        if version not in VERSIONS:
            big = version & 0xFFFF == 0
            raise CheckpointError(
                f"{self.path} is a GGUF file of version {version}" if not big else f"{self.path} is big-endian",
                "Only little-endian files of versions 2 and 3 are read: convert the model again with llama.cpp.",
            )
        tensor_count = self.count("tensors", 24)  # a name's length, dimensions, type and offset at least
        key_count = self.count("keys", 13)
        metadata: dict[str, Any] = {}
        for number in range(key_count):
            key = self.string(f"key {number}")
            if key in metadata:
                raise self.damaged(f"the key {key} stands twice")
            metadata[key] = self.value(key)
        infos = [self.info(number) for number in range(tensor_count)]
        alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise self.damaged(f"general.alignment is {alignment!r}, not a power of two")
        start = self.at + -self.at % alignment
        return metadata, self.tensors(infos, start, alignment)

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged: {what}", "Fetch the file again.")

    def need(self, length: int, what: str) -> None:
        if length > len(self.data) - self.at:
            raise self.damaged(
                f"{what} goes past the end of the file ({length} bytes at {self.at} of {len(self.data)})"
            )
        if length > MAX_HEADER - self.at:
            raise self.damaged(f"its header is larger than {MAX_HEADER} bytes, up to {what} alone")

    def scalar(self, code: str, what: str) -> Any:
        length = struct.calcsize(f"<{code}")
        self.need(length, what)
        (value,) = struct.unpack_from(f"<{code}", self.view, self.at)
        self.at += length
        return value

    def count(self, what: str, least: int) -> int:
        """Read a count of things that take at least ``least`` bytes each."""
        count: int = self.scalar("Q", f"the number of {what}")
        if count > MAX_ITEMS or count * least > len(self.data) - self.at:
            raise self.damaged(f"it announces {count} {what}, more than it can hold")
        return count

    def string(self, what: str) -> str:
        length = self.scalar("Q", f"the length of {what}")
        self.need(length, what)
        try:
            text = str(self.view[self.at : self.at + length], "utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"{what} is not UTF-8") from error
        self.at += length
        return text

    def value_type(self, what: str) -> GGUFValueType:
        number = self.scalar("I", f"the type of {what}")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise self.damaged(f"{what} has the unknown type {number}") from None

    def value(self, key: str) -> Any:
        kind = self.value_type(key)
        if kind == GGUFValueType.STRING:
            return self.string(key)
        if kind != GGUFValueType.ARRAY:
            return self.scalar(SCALARS[kind], key)
        inner = self.value_type(f"the items of {key}")
        if inner == GGUFValueType.ARRAY:  # llama.cpp reads none either
            raise self.damaged(f"{key} is an array of arrays")
        if inner == GGUFValueType.STRING:
            return [self.string(f"an item of {key}") for _ in range(self.count(f"items of {key}", 8))]
        code = f"<{SCALARS[inner]}"
        length = struct.calcsize(code)
        count = self.count(f"items of {key}", length)
        self.need(count * length, key)
        items = np.frombuffer(self.view, np.dtype(code), count, self.at).tolist()
        self.at += count * length
        return items

    def info(self, number: int) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name = self.string(f"the name of tensor {number}")
        count = self.scalar("I", f"the dimensions of {name}")
        if not 1 <= count <= MAX_DIMS:
            raise self.damaged(f"tensor {name} has {count} dimensions")
        shape = tuple(self.scalar("Q", f"the dimensions of {name}") for _ in range(count))[::-1]
        type_number = self.scalar("I", f"the type of {name}")
        try:
            kind = GGMLQuantizationType(type_number)
        except ValueError:
            raise self.damaged(f"tensor {name} has the unknown type {type_number}") from None
        return name, shape, kind, self.scalar("Q", f"the offset of {name}")

    def tensors(
        self, infos: list[tuple[str, tuple[int, ...], GGMLQuantizationType, int]], start: int, alignment: int
    ) -> dict[str, GGUFTensor]:
        found: dict[str, GGUFTensor] = {}
        end = 0
        for name, shape, kind, offset in sorted(infos, key=lambda info: info[3]):
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if name in found:
                raise self.damaged(f"tensor {name} stands twice")
            if min(shape) < 1 or shape[-1] % block:
                raise self.damaged(f"tensor {name} of shape {shape} cannot be {kind.name}")
            row = shape[-1] // block * block_bytes
            rows = math.prod(shape[:-1])
            if offset % alignment or offset < end:
                raise self.damaged(f"tensor {name} begins at an impossible offset ({offset})")
            end = offset + rows * row
            if start + end > len(self.data):
                raise self.damaged(
                    f"tensor {name} goes past the end of the file ({start + end} of {len(self.data)} bytes)"
                )
            data = self.data[start + offset : start + end].reshape(rows, row)
            found[name] = GGUFTensor(name, shape, kind, data)
        return {name: found[name] for name, *_ in infos}
