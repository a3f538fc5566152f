"""Rounding to 8 bits without zero points; in a graph of 4 bits, in wider blocks than the builder's."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import GraphProto, numpy_helper

from mka_export.models.checkpoint import Checkpoint
from mka_onnx.building import unknown_builder
from mka_onnx.nbits import MATMUL, matrix_name
from mka_onnx.nodes import sources

MIDDLE, LARGEST = 128, 127  # the code of 0, and how far the others go from it
ROWS = 4096  # rounded at once


def round_to_8_bits(values: NDArray[np.float32], block: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Round rows whose length is a multiple of ``block`` to the nearest.

    Returns:
        codes (rows, blocks, block) around ``MIDDLE``, and scales (rows, blocks).
    """
    codes, scales = zip(
        *(_round(values[start : start + ROWS], block) for start in range(0, len(values), ROWS)), strict=True
    )
    return np.concatenate(codes), np.concatenate(scales)


def round_anew(graph: GraphProto, checkpoint: Checkpoint, block: int) -> None:
    """Round the 8-bit matrices of a graph anew from the checkpoint's weights, in blocks of ``block`` without zero points.

    The builder gives all matrices the same blocks. Those whose rows are no multiple of ``block`` stay as they are.

    Args:
        graph: with its weights in it.

    Raises:
        ConversionError: the graph has a matrix that is no layer's and not the head's.
    """
    tensors, made_of = {tensor.name: tensor for tensor in graph.initializer}, dict(sources(checkpoint))
    for node in graph.node:
        about = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type != MATMUL or about["bits"].i != 8 or about["K"].i % block:
            continue
        if (names := made_of.get(matrix_name(node))) is None:
            raise unknown_builder(f"the builder's graph has an unknown matrix, {node.name}")
        weights = torch.cat([checkpoint.tensor(name).float() for name in names])
        about["block_size"].i = block
        codes, scales = round_to_8_bits(weights.numpy(), block)
        tensors[node.input[1]].CopyFrom(numpy_helper.from_array(codes, node.input[1]))
        tensors[node.input[2]].CopyFrom(numpy_helper.from_array(scales, node.input[2]))
        _without_zeros(graph, node.input[3] if len(node.input) > 3 else "")


def _without_zeros(graph: GraphProto, zeros: str) -> None:
    """Take zero points out of a graph: from a node that misses them they are in the middle of the codes."""
    for node in graph.node:
        for place in [i for i, name in enumerate(node.input) if zeros and name == zeros]:
            node.input[place] = ""
    for tensor in [tensor for tensor in graph.initializer if tensor.name == zeros]:
        graph.initializer.remove(tensor)


def _round(rows: NDArray[np.float32], block: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    blocks = rows.reshape(len(rows), -1, block)
    scales = np.abs(blocks).max(axis=-1) / np.float32(LARGEST)
    steps = blocks / np.where(scales > 0, scales, np.float32(1))[..., None]
    return (np.rint(steps) + MIDDLE).astype(np.uint8), scales
