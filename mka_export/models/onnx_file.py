"""ONNX graphs and the files their weights are in, read without believing them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, TensorProto

from mka_export.errors import CheckpointError

LARGEST_GRAPH = 2**31  # bytes: of a protobuf message


def read_graph(path: Path) -> ModelProto:
    """Read a graph without the weights that lie in other files.

    Raises:
        CheckpointError: the file is none, or too large for one.
    """
    try:
        if path.stat().st_size >= LARGEST_GRAPH:
            raise CheckpointError(f"{path} is larger than an ONNX graph can be", "Make it anew.")
        return onnx.load(path, load_external_data=False)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}", "Make it anew.") from error
    except DecodeError as error:
        raise CheckpointError(f"{path} is no ONNX graph: {error}", "Make it anew.") from error


def initializers(graph: GraphProto) -> Iterator[TensorProto]:
    """Yield all weights and constants of a graph and of the graphs inside its nodes."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            if attribute.HasField("g"):
                yield from initializers(attribute.g)
            for inner in attribute.graphs:
                yield from initializers(inner)


def require_own_files(model: ModelProto, path: Path) -> None:
    """Check that the weights of the graph in ``path`` are in files beside it.

    Raises:
        CheckpointError: one is not a plain file of its own in the graph's folder: a path elsewhere, a symbolic or hard
            link, or missing. Such a graph could have any file of this machine read as weights.
    """
    names = {
        entry.value
        for tensor in initializers(model.graph)
        if tensor.data_location == TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    for name in sorted(names):
        file = path.with_name(name) if name and Path(name).name == name else None
        if file is None or file.is_symlink() or not file.is_file() or file.stat().st_nlink != 1:
            raise CheckpointError(
                f"{path} has its weights in {name!r}, which is no file of its own beside it", "Make the folder anew."
            )
