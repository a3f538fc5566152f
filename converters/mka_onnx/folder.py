"""The folder that ships: one graph with its weights, opened by onnxruntime-genai, ONNX Runtime and transformers.js."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
from onnx import GraphProto, TensorProto
from onnx.external_data_helper import load_external_data_for_model

from mka_export.data import load_json
from mka_export.models.checkpoint import Checkpoint
from mka_export.models.onnx_file import initializers, read_graph
from mka_export.needs import BROWSER_BUFFER
from mka_onnx.building import unknown_builder
from mka_onnx.eight_bits import round_anew
from mka_onnx.embedding import LOOKUP, own_embedding, plain_embedding, quantize_embedding
from mka_onnx.settings import Precision
from mka_onnx.tokenizer import write_tokenizer

GENAI_CONFIG, CONFIG = "genai_config.json", "config.json"
CACHE_WIDTH = "kv_cache_dim"  # the builder's symbol for a head's width


def finish(folder: Path, checkpoint: Checkpoint, precision: Precision, block: int) -> list[str]:
    """Make what the builder left in ``folder`` openable by every client; returns warnings.

    - The weights are called as transformers.js looks for them, ``model….onnx_data``, and the graph refers to that name.
    - The width of the key-value cache is a number: transformers.js takes a symbol there for 0.
    - In a graph of 4 bits those of 8 have wider blocks: see ``mka_onnx.eight_bits``.
    - The embedding of a quantized graph has 8 bits, and is looked up by standard operators: see ``mka_onnx.embedding``.
    - ``config.json`` is the checkpoint's, with what transformers.js needs to know.
    - So is the tokenizer, with what onnxruntime-genai needs to know: see ``mka_onnx.tokenizer``.

    Args:
        checkpoint: what it was made from.
        block: how many weights of a row of 8 bits share a scale.

    Raises:
        ConversionError: the builder left something else than it used to.
    """
    graph = folder / precision.graph
    built, data = graph.with_name(graph.name + ".data"), graph.with_name(graph.name + "_data")
    if not graph.is_file():
        raise unknown_builder(f"the builder left no {graph.name}")
    config = load_json(folder / GENAI_CONFIG)
    decoder = config["model"]["decoder"]
    model = read_graph(graph)
    _name_cache_width(model.graph, decoder["head_size"])
    external = [tensor for tensor in initializers(model.graph) if tensor.data_location == TensorProto.EXTERNAL]
    if precision.quantized:
        load_external_data_for_model(model, str(graph.parent))
        built.unlink(missing_ok=True)
        if precision.bits == 4:
            round_anew(model.graph, checkpoint, block)
        plain_embedding(model.graph)
        if lookup := own_embedding(model.graph):
            quantize_embedding(model.graph, lookup, block)
        onnx.save(model, graph, save_as_external_data=bool(external), location=data.name)
    else:
        if external:
            built.rename(data)
        for tensor in external:
            _refer(tensor, data.name)
        onnx.save(model, graph)
    decoder["filename"] = precision.graph
    decoder["session_options"] = {"provider_options": []}  # whoever has another provider names it
    _write(folder / GENAI_CONFIG, config)
    for_browser = {"dtype": precision.dtype, **({"use_external_data_format": True} if external else {})}
    _write(folder / CONFIG, {**load_json(checkpoint.path / CONFIG), "transformers.js_config": for_browser})
    write_tokenizer(checkpoint, folder)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    size, warnings = data.stat().st_size if external else 0, []
    if size > BROWSER_BUFFER:
        warnings.append(
            f"{data.name} has {size / 1e9:.1f} GB; a browser holds at most 2.1 GB in one buffer, and will not open it"
        )
    if any(node.op_type == LOOKUP for node in model.graph.node):
        warnings.append(f"the embedding has 4 bits and is looked up by {LOOKUP}, which browsers have on WebGPU only")
    return warnings


def _refer(tensor: TensorProto, name: str) -> None:
    for entry in tensor.external_data:
        if entry.key == "location":
            entry.value = name


def _name_cache_width(graph: GraphProto, width: int) -> None:
    for value in (*graph.input, *graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == CACHE_WIDTH:
                dimension.dim_value = width


def _write(path: Path, contents: Any) -> None:
    path.write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
