"""The weights of a quantized folder, back in a checkpoint: what rounding lost, told from what the runtime does."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from mka_export.errors import CheckpointError, UnsupportedError
from mka_export.models.checkpoint import CONFIG, Checkpoint
from mka_export.models.checkpoint_writer import CheckpointWriter, copy_tokenizer
from mka_export.models.onnx_file import read_graph, require_own_files
from mka_export.needs import require_room
from mka_export.progress import Progress
from mka_export.target import Target
from mka_onnx.embedding import own_rows
from mka_onnx.nbits import quantized_matrices
from mka_onnx.nodes import sources
from mka_onnx.settings import read_settings
from mka_onnx.size import FLOAT


def unpack(folder: Path, target: Target, checkpoint: Checkpoint, out: Path, progress: Progress) -> None:
    """Write the checkpoint that a folder's codes and scales stand for, its matrices in float32.

    Vectors (norms and biases), which no precision rounds, are those of the checkpoint that the folder was made from.

    Args:
        folder: with the graph of
        target: what it was made for.
        checkpoint: what it was made from.
        out: an existing, empty folder.

    Raises:
        CheckpointError: the folder is not as we made it.
        UnsupportedError: its weights are not quantized.
        MkaError: the disk has no room for the checkpoint.
    """
    precision, _ = read_settings(target)
    if not precision.quantized:
        raise UnsupportedError(f"the weights of {folder.name} are not quantized")
    graph = folder / precision.graph
    model = read_graph(graph)
    require_own_files(model, graph)
    matrices = quantized_matrices(model, graph.parent)
    require_room(
        out, FLOAT * checkpoint.parameters, f"unpacking {folder.name}", "Free space there, or use a larger disk."
    )
    left, embedding = set(checkpoint.shards), checkpoint.architecture.tensors["embedding"]
    with progress.task(f"reading {folder.name}", len(matrices)) as task, CheckpointWriter(out) as writer:
        for node, names in sources(checkpoint):
            shapes = [checkpoint.shapes[name] for name in names]
            rows = sum(shape[0] for shape in shapes)
            if node not in matrices or matrices[node].shape != (rows, shapes[0][1]):
                raise CheckpointError(f"{graph} does not hold {' + '.join(names)}", "Make the folder anew.")
            parts = torch.split(matrices[node].read().dequantize(), [shape[0] for shape in shapes])
            for name, part in zip(names, parts, strict=True):
                writer.add(name, part)
                left.remove(name)
            task.advance()
        if embedding in left:
            writer.add(embedding, torch.from_numpy(own_rows(model.graph, graph.parent)))
            left.remove(embedding)
        for name in sorted(left):
            writer.add(name, checkpoint.tensor(name))
    shutil.copy(checkpoint.path / CONFIG, out / CONFIG)
    copy_tokenizer(checkpoint.path, out)
