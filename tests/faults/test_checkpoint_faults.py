"""Checkpoint"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import type_in
from fault_tools import DONE, LOOSE, MERGE, SMALL
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

WEIGHTS = "model.safetensors"
RUN = [*MERGE, "--to", "gguf-q8", "--out", "{out}", *SMALL, "--quiet"]


def header(edit: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Change the JSON header of the weights file, and its length with it."""

    def damage(model: Path) -> None:
        data = (model / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        tensors = json.loads(data[8 : 8 + length])
        edit(tensors)
        new = json.dumps(tensors).encode()
        (model / WEIGHTS).write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length :])

    return damage


def weights(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        tensors = load_file(model / WEIGHTS)
        edit(tensors)
        save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})

    return damage


def config(**changes: object) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def index(**places: str) -> Callable[[Path], None]:
    """Write an index that puts all tensors into the one file, but ``places``."""

    def damage(model: Path) -> None:
        weight_map = dict.fromkeys(load_file(model / WEIGHTS), WEIGHTS)
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {**weight_map, **places}}))

    return damage


def cut(model: Path) -> None:
    data = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(data[: len(data) // 2])


def absurd_length(model: Path) -> None:
    data = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 60) + data[8:])


def pickled(model: Path) -> None:
    (model / WEIGHTS).rename(model / "pytorch_model.bin")


def written(name: str, text: str) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        (model / name).write_text(text)

    return damage


def set_first(name: str, value: float) -> Callable[[Path], None]:
    return weights(lambda tensors: tensors[name].view(-1)[:1].fill_(value))


def overlap(tensors: dict[str, Any]) -> None:
    names = [name for name in tensors if name != "__metadata__"]
    tensors[names[1]]["data_offsets"] = tensors[names[0]]["data_offsets"]
    tensors[names[1]]["shape"] = tensors[names[0]]["shape"]


def overflow(tensors: dict[str, Any]) -> None:
    tensors["model.norm.weight"]["shape"] = [1 << 40, 1 << 40]


NORM, UP = "model.norm.weight", "model.layers.2.mlp.up_proj.weight"
CASES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "a shard is truncated": (cut, (WEIGHTS, "damaged", "Fetch")),
    "a header announces an absurd length": (absurd_length, (WEIGHTS, "damaged")),
    "two tensors overlap": (header(overlap), (WEIGHTS, "damaged")),
    "the product of a shape overflows": (header(overflow), (WEIGHTS, "damaged")),
    "the index names a shard that is missing": (index(**{NORM: "x.safetensors"}), ("lacks x.safetensors",)),
    "the index names two shards that are missing": (
        index(**{NORM: "x.safetensors", UP: "y.safetensors"}),
        ("lacks x.safetensors, y.safetensors",),
    ),
    "the index names tensors that no shard holds": (index(**{"a.b": WEIGHTS, "c.d": WEIGHTS}), ("a.b, c.d",)),
    "the index climbs out of its folder": (index(**{NORM: "../x.safetensors"}), ("outside its folder", "../x")),
    "the index names an absolute path": (index(**{NORM: "/x.safetensors"}), ("outside its folder: /x",)),
    "the index climbs out as Windows spells it": (index(**{NORM: "..\\x.safetensors"}), ("outside its folder",)),
    "the index names a drive of Windows": (index(**{NORM: "C:\\x.safetensors"}), ("outside its folder",)),
    "the index names another machine, as Windows spells it": (
        index(**{NORM: "\\\\server\\share\\x.safetensors"}),
        ("outside its folder",),
    ),
    "the index is no JSON": (written("model.safetensors.index.json", "{"), ("index.json",)),
    "config.json is no JSON": (written("config.json", "not json"), ("config.json",)),
    "config.json is nested without end": (written("config.json", "[" * 100_000), ("config.json",)),
    "there are only pickled weights": (pickled, ("only pickled weights", "save_pretrained")),
    "the config asks for custom code": (config(auto_map={"AutoModel": "x.py"}), ("auto_map", "no code")),
    "a weight is NaN": (set_first(UP, float("nan")), (UP, "NaN")),
    "a weight is infinite": (set_first(UP, float("inf")), (UP, "infinity")),
    "a weight outside the layers is NaN": (set_first(NORM, float("nan")), (NORM, "NaN")),
    "the config announces more layers than there are": (config(num_hidden_layers=9), ("9 layers", "make 6")),
    "a layer lacks a tensor": (weights(lambda t: t.pop(UP)), ("lacks", UP)),
    "a layer has a tensor too many": (
        weights(lambda t: t.update({"model.layers.2.mlp.router.weight": torch.ones(2)})),
        ("unknown", "model.layers.2.mlp.router.weight"),
    ),
    "a tensor has another shape than the config says": (
        weights(lambda t: t.update({UP: torch.ones(3, 64)})),
        (UP, "[3, 64]", "[160, 64]"),
    ),
    "the architecture is unknown": (
        config(architectures=["LlamaForCausalLN"]),
        ("LlamaForCausalLN", "did you mean LlamaForCausalLM"),
    ),
    "the model is a mixture of experts": (config(architectures=["MixtralForCausalLM"]), ("MixtralForCausalLM",)),
    "the tokenizer has more tokens than the embedding rows": (
        lambda model: (
            (weights(lambda t: t.update({"model.embed_tokens.weight": torch.ones(600, 64)}))(model), None)[1]
            or config(vocab_size=600)(model)
        ),
        ("639", "600"),
    ),
    "the weights are quantized to fp8 already": (
        config(quantization_config={"quant_method": "fp8"}),
        ("already quantized (fp8)",),
    ),
    "the weights are quantized to 4 bits already": (
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ("already quantized (bitsandbytes)",),
    ),
    "there is no tokenizer": (
        lambda model: [f.unlink() for f in [*model.glob("token*"), *model.glob("special*")]] and None,
        ("tokenizer",),
    ),
}


@pytest.mark.parametrize("fault", CASES)
def test_refused(fault, model, refused):
    damage, words = CASES[fault]
    damage(model)
    refused([model, *RUN], *words)


@pytest.mark.parametrize("tied", ["the tied head is absent", "the tied head is there, and equal"])
def test_survived_tied(tied, model, tmp_path):
    tensors = load_file(model / WEIGHTS)
    tensors.pop("lm_head.weight", None)
    if "equal" in tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})
    result = type_in(model, *MERGE, "--to", "gguf-q8", "--out", tmp_path / "out", *SMALL, *LOOSE)
    assert result.exit_code in DONE, result.output
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")


def test_survived_padding_rows(model, tmp_path):
    """the embedding has padding rows: recorded, and the file works"""
    weights(lambda t: t.update({"model.embed_tokens.weight": torch.cat([t["model.embed_tokens.weight"]] * 2)[:700]}))(
        model
    )
    config(vocab_size=700)(model)
    result = type_in(model, *MERGE, "--to", "gguf-q8", "--out", tmp_path / "out", *SMALL, *LOOSE, "--json", "--quiet")
    assert result.exit_code in DONE, result.output
    (target,) = json.loads(result.stdout)["targets"]
    assert target["artifact"]["details"]["vocabulary"] == {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": 640,
        "padding": 60,
    }


def test_survived_layer_types(pico_qwen2, tmp_path):
    """the config has a list with one entry a layer, and a position between layers: both follow the layers"""
    model, kinds = tmp_path / "sliding", ["full_attention"] * 3 + ["sliding_attention"] * 3
    shutil.copytree(pico_qwen2, model)
    config(use_sliding_window=True, sliding_window=32, max_window_layers=3, layer_types=kinds)(model)
    result = type_in("merge", model, *MERGE, "--out", tmp_path / "out", *SMALL, "--quiet")
    assert result.exit_code == 0, result.output
    merged = json.loads((tmp_path / "out" / "merged" / "config.json").read_text())
    plan = json.loads((tmp_path / "out" / "merged" / "plan.json").read_text())
    assert merged["layer_types"] == [kinds[first] for first, _ in plan["layers"]]
    assert merged["max_window_layers"] == sum(first < 3 for first, _ in plan["layers"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    assert loaded.config.layer_types == merged["layer_types"]
