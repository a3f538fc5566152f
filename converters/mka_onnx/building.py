"""onnxruntime-genai's model builder, in a process of its own."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mka_export.child import Child
from mka_export.errors import ConversionError
from mka_export.progress import Task

INSTALL = "Install it: pip install 'mka-export[onnx]'."
LAYER = "Reading layer"  # what the builder prints before each
SAVE = "Saving ONNX model"


def build(
    source: Path,
    out: Path,
    precision: str,
    provider: str,
    options: Mapping[str, str],
    weights: Mapping[str, Any] | None,
    task: Task,
) -> None:
    """Let the builder make graph, weights and ``genai_config.json`` from the checkpoint ``source`` in the folder ``out``.

    Args:
        precision: the builder's name of a number format.
        provider: its name of an execution provider.
        options: the builder's extra options.
        weights: its ``quant_config.weights``, where these are to be quantized.
        task: advanced once a layer, and once when the graph is being saved.

    Raises:
        ConversionError: the builder is not installed or fails; the message carries its last words.
        RuntimeFailure: it crashes, hangs, or is killed for want of memory.
    """
    arguments = (source, out, precision, provider, dict(options), weights)
    with Child("onnxruntime-genai's model builder", _build, *arguments) as child:
        while (line := child.receive()) is not None:
            if line.startswith((LAYER, SAVE)):
                task.advance()
        child.finish()


def _build(
    connection: Connection,
    source: Path,
    out: Path,
    precision: str,
    provider: str,
    options: dict[str, str],
    weights: Mapping[str, Any] | None,
) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    where = ("", str(source), str(out), precision, provider, str(out / "cache"))
    words = [f"{name}={value}" for name, value in options.items()]
    structured = {"quant_config": {"weights": weights}} if weights else None
    with redirect_stdout(_Lines(connection)), redirect_stderr(io.StringIO()):  # the latter gets progress bars
        try:
            from onnxruntime_genai.models import builder
        except ImportError as error:
            raise ConversionError(f"onnxruntime-genai's model builder cannot be loaded: {error}", INSTALL) from error
        try:
            parsed = builder.parse_extra_options(*where, words, target_options=structured)
            builder.create_model(*where, **parsed)
        except MemoryError:
            raise
        except Exception as error:
            raise ConversionError(f"onnxruntime-genai's model builder: {type(error).__name__}: {error}") from error
    connection.send(None)


class _Lines(io.TextIOBase):
    """Sends each line that is printed: a sign of life, and how far it is."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._line = connection, ""

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._connection.send(line)
        return len(text)


def unknown_builder(what: str) -> ConversionError:
    """Return the error that the builder made ``what``, which no version known to us does."""
    return ConversionError(what, "This version of onnxruntime-genai is not supported.")


def require_builder() -> None:
    """Raise ``ConversionError`` where the builder is not installed."""
    for name in ("onnxruntime_genai", "onnx_ir", "onnxscript", "onnx"):
        if find_spec(name) is None:
            raise ConversionError(f"ONNX needs {name}, which is not installed", INSTALL)
