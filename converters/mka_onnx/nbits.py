"""The quantized matrices of a graph: ``MatMulNBits`` of ONNX Runtime's contrib operators, read and written in place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from torch import Tensor

from mka_export.models.onnx_file import read_graph
from mka_onnx.gptq import Blocks

MATMUL = "MatMulNBits"


@dataclass(frozen=True)
class NBits:
    """One ``MatMulNBits`` node.

    Attributes:
        name: of the node before it was quantized, ``/model/layers.0/attn/qkv_proj/MatMul``.
        bits: of a code.
        block: columns that share a scale.
        shape: (rows, columns) of the matrix that its input is multiplied with: N and K of the operator.
    """

    name: str
    bits: int
    block: int
    shape: tuple[int, int]
    _tensors: tuple[TensorProto, ...]
    _folder: Path

    @property
    def symmetric(self) -> bool:
        """All zeros are in the middle of the codes' range, and not stored."""
        return len(self._tensors) == 2

    @property
    def blocks(self) -> int:
        """How many make up a row."""
        return ceil(self.shape[1] / self.block)

    def read(self) -> Blocks:
        """Return the matrix."""
        (rows, columns), count = self.shape, self.blocks
        codes = _unpack(_bytes(self._tensors[0], self._folder).reshape(rows * count, -1), self.bits)
        scales = _bytes(self._tensors[1], self._folder).view(np.float32).reshape(rows, count)
        if self.symmetric:
            zeros = torch.full((rows, count), 2 ** (self.bits - 1), dtype=torch.uint8)
        else:
            zeros = _unpack(_bytes(self._tensors[2], self._folder).reshape(rows, -1), self.bits)[:, :count]
        return Blocks(codes.view(rows, -1)[:, :columns], torch.from_numpy(scales.copy()), zeros, self.block)

    def write(self, blocks: Blocks) -> None:
        """Put another matrix of the same shape, bits and blocks in its place; what is inside of the graph changes there."""
        (rows, columns), count = self.shape, self.blocks
        codes = torch.nn.functional.pad(blocks.codes, (0, count * self.block - columns))
        parts = [_pack(codes.view(rows * count, -1), self.bits), blocks.scales.numpy()]
        if not self.symmetric:
            parts.append(_pack(blocks.zeros, self.bits))
        for tensor, part in zip(self._tensors, parts, strict=True):
            _put(tensor, self._folder, part.tobytes())


def quantized_matrices(model: ModelProto, folder: Path) -> dict[str, NBits]:
    """Return the quantized matrices of a graph, by name; the weights lie in ``folder`` or in the graph itself."""
    return {matrix.name: matrix for matrix in _matrices(model, folder)}


def _matrices(model: ModelProto, folder: Path) -> Iterator[NBits]:
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == MATMUL:
            about = {attribute.name: attribute.i for attribute in node.attribute}
            given = tuple(tensors[name] for name in node.input[1:4] if name)  # B, scales, zero points if any
            shape = about["N"], about["K"]
            yield NBits(matrix_name(node), about["bits"], about["block_size"], shape, given, folder)


def matrix_name(node: NodeProto) -> str:
    """Return what a node was called before it was quantized, without ``_Q4`` or ``_Q8``."""
    return str(node.name.rpartition("_Q")[0])


def accuracy_level(graph: Path) -> int | None:
    """Return how roughly the inputs of a graph's quantized matrices may be rounded, as its file has it; None without such.

    It is ``MatMulNBits``' attribute: 1 float32, 2 float16, 3 bfloat16, 4 int8; 0 leaves it to the provider. If the
    matrices differ, the highest.
    """
    nodes = (node for node in read_graph(graph).graph.node if node.op_type == MATMUL)
    levels = [attribute.i for node in nodes for attribute in node.attribute if attribute.name == "accuracy_level"]
    return max(levels, default=None)


def _pack(values: Tensor, bits: int) -> NDArray[np.uint8]:
    """Pack rows of codes into bytes; the first of two 4-bit codes is the lower half."""
    codes = values.numpy()
    if bits == 8:
        return codes
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)))
    packed: NDArray[np.uint8] = codes[:, ::2] | codes[:, 1::2] << 4
    return packed


def _unpack(packed: NDArray[np.uint8], bits: int) -> Tensor:
    if bits == 8:
        return torch.from_numpy(packed.copy())
    return torch.from_numpy(np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1))


def _bytes(tensor: TensorProto, folder: Path) -> NDArray[np.uint8]:
    if tensor.data_location != TensorProto.EXTERNAL:
        return np.frombuffer(numpy_helper.to_array(tensor).tobytes(), dtype=np.uint8)
    where = {entry.key: entry.value for entry in tensor.external_data}
    start, length = int(where.get("offset", 0)), int(where["length"])
    return np.fromfile(folder / where["location"], dtype=np.uint8, count=length, offset=start)


def _put(tensor: TensorProto, folder: Path, data: bytes) -> None:
    if tensor.data_location != TensorProto.EXTERNAL:
        tensor.ClearField("int32_data")
        tensor.ClearField("float_data")
        tensor.raw_data = data
        return
    where = {entry.key: entry.value for entry in tensor.external_data}
    if len(data) != int(where["length"]):
        raise ValueError(f"{tensor.name} has {where['length']} bytes, not {len(data)}")
    with (folder / where["location"]).open("r+b") as file:
        file.seek(int(where.get("offset", 0)))
        file.write(data)
