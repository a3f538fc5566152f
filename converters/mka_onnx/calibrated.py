"""Quantized weights fitted, layer by layer, to what goes into them on the calibration text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from pathlib import Path

import onnx
import torch
from torch import Tensor

from mka_export.models.checkpoint import Checkpoint
from mka_export.models.finite import check_finite
from mka_export.models.onnx_file import read_graph
from mka_export.models.runner import LayerRunner
from mka_export.models.statistics import Grams
from mka_export.progress import Progress
from mka_onnx.building import unknown_builder
from mka_onnx.gptq import fit_scales, quantize
from mka_onnx.nbits import NBits, quantized_matrices
from mka_onnx.nodes import MATRICES, node_name

FIT_TOKENS = 8192
ALIKE = 0.5  # of a matrix, what rounding to the nearest loses at most in norm: more is another matrix


def fit_weights(graph: Path, checkpoint: Checkpoint, ids: Tensor, progress: Progress) -> None:
    """Put better weights into the 4-bit matrices of all layers of a graph that was made from ``checkpoint``.

    Each layer sees the stream that the quantized layers below leave (arXiv 2210.17323, section 4). Matrices of 8 bits, and the
    head, stay as they are.

    Args:
        graph: its file, with the weights beside it.
        ids: calibration windows (N, T), of which every n-th is used, so that they have ``FIT_TOKENS`` at most.

    Raises:
        ConversionError: the graph is not laid out as known.
    """
    ids = ids[:: math.ceil(ids.numel() / FIT_TOKENS)]
    model, runner = read_graph(graph), LayerRunner(checkpoint)
    matrices = quantized_matrices(model, graph.parent)
    for index, node in product(range(checkpoint.num_layers), MATRICES):
        if node_name(index, node) not in matrices:
            raise unknown_builder(f"the builder's graph has no {node_name(index, node)}")
    states, names = runner.embed(ids), checkpoint.architecture.layer
    with progress.task("fit the 4-bit weights to the calibration text", checkpoint.num_layers) as task:
        for index in range(checkpoint.num_layers):
            fitted = [
                (matrix, [names[role] for role in roles])
                for node, roles in MATRICES.items()
                if (matrix := matrices[node_name(index, node)]).bits == 4
            ]
            weights, grams = runner.weights(index), Grams({_module(parts) for _, parts in fitted})
            batches = list(runner.batches(*ids.shape))
            for batch in batches:
                check_finite(
                    runner.run_layer(index, weights, states[batch], grams), f"layer {index}", range(len(ids))[batch]
                )
            rounded = dict(weights)
            for matrix, parts in fitted:
                rounded |= _fit(matrix, parts, weights, grams)
            for batch in batches:
                states[batch] = runner.run_layer(index, rounded, states[batch])
            task.advance()
    onnx.save(model, graph)


def _fit(matrix: NBits, names: list[str], weights: Mapping[str, Tensor], grams: Grams) -> dict[str, Tensor]:
    """Write a better matrix; returns the weights that it now stands for, by their names."""
    whole = torch.cat([weights[name] for name in names])
    if whole.shape != matrix.shape or (matrix.read().dequantize() - whole).norm() > ALIKE * whole.norm():
        raise unknown_builder(f"the builder's {matrix.name} is not {' + '.join(names)}")
    gram = grams[_module(names)]
    blocks = fit_scales(quantize(whole, gram, matrix.bits, matrix.block, matrix.symmetric), whole, gram)
    matrix.write(blocks)
    parts = torch.split(blocks.dequantize(), [len(weights[name]) for name in names])
    return dict(zip(names, parts, strict=True))


def _module(names: list[str]) -> str:
    """Return the first of the modules whose weights make up a matrix: all have the same input."""
    return names[0].removesuffix(".weight")
