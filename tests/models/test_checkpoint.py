"""Checkpoints written in several shards, read back by us and by transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mka_export.errors import CheckpointError
from mka_export.models.checkpoint import Checkpoint
from mka_export.models.checkpoint_writer import CheckpointWriter


@pytest.fixture
def sharded(pico_llama: Path, tmp_path: Path) -> Path:
    source, folder = Checkpoint.open(pico_llama), tmp_path / "sharded"
    folder.mkdir()
    with CheckpointWriter(folder, shard_bytes=100_000) as writer:
        for name in source.shards:
            writer.add(name, source.tensor(name))
    shutil.copy(pico_llama / "config.json", folder)
    return folder


def test_shards_hold_the_same_model(sharded: Path, pico_llama: Path) -> None:
    assert len(list(sharded.glob("model-*-of-*.safetensors"))) > 2
    assert not list(sharded.glob("shard-*"))
    ours, source = Checkpoint.open(sharded), Checkpoint.open(pico_llama)
    assert set(ours.shards) == set(source.shards)
    assert (
        json.loads((sharded / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
        == source.parameters * 4
    )
    theirs, original = (AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (sharded, pico_llama))
    assert all(torch.equal(theirs[name], original[name]) for name in original)
    assert all(torch.equal(ours.tensor(name), source.tensor(name)) for name in source.shards)


def test_missing_shard_is_named(sharded: Path) -> None:
    lost = sorted(sharded.glob("model-*"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=lost.name):
        Checkpoint.open(sharded)


def test_index_that_leaves_its_folder_is_refused(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["model.norm.weight"] = "../other/model.safetensors"
    index.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="outside its folder"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number_is_named(value: float, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="some.weight"), CheckpointWriter(tmp_path) as writer:
        writer.add("some.weight", torch.tensor([1.0, value]))
    assert not list(tmp_path.iterdir())
