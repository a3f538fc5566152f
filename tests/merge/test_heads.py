"""Attention heads that compete: what the merged layer's heads do, in transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from merge_tools import WINDOWS, merged, settings
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mka_export.merge.heads import compete_heads
from mka_export.merge.trajectory import Trajectory
from mka_export.models.checkpoint import Checkpoint
from mka_export.models.runner import LayerRunner

IDS = torch.from_numpy(WINDOWS)
LOWER, UPPER = 2, 3


def heads_of(model: Path, weights: dict[str, Tensor], states: Tensor, layer: int = LOWER) -> Tensor:
    """What a layer with these attention weights brings to o_proj, by transformers: (N, T, heads, head size)."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).model
    loaded.layers[layer].load_state_dict(weights, strict=False)
    found: list[Tensor] = []
    hook = loaded.layers[layer].self_attn.o_proj.register_forward_pre_hook(lambda _m, inputs: found.append(inputs[0]))
    for other in [i for i in range(len(loaded.layers)) if i != layer]:
        loaded.layers[other].register_forward_hook(lambda _m, inputs, _out: inputs[0])
    loaded.layers[layer].register_forward_pre_hook(lambda _m, _inputs: (states,))
    with torch.no_grad():
        loaded(IDS)
    hook.remove()
    return found[0].unflatten(-1, (loaded.config.num_attention_heads, -1))


@pytest.mark.parametrize("family", ["pico_llama", "pico_qwen2"])
def test_kept_heads_do_what_they_did(family, request, tmp_path):
    model = request.getfixturevalue(family)
    runner = LayerRunner(Checkpoint.open(model))
    config = runner.checkpoint.config
    trajectory = Trajectory(runner, IDS, tmp_path / "states")
    fused, figures = compete_heads(trajectory, LOWER, UPPER)
    states = trajectory.before(LOWER, slice(0, len(IDS)))
    both = torch.cat([heads_of(model, runner.weights(i), states) for i in (LOWER, UPPER)], dim=2)
    made = heads_of(model, fused, states)
    # Every group of the merged layer is one of the two layers', whole, in order.
    groups, size = config["num_key_value_heads"], config["num_attention_heads"] // config["num_key_value_heads"]
    both, made = both.unflatten(2, (2 * groups, size)), made.unflatten(2, (groups, size))
    distances = (both[:, :, :, None] - made[:, :, None]).abs().amax(dim=(0, 1, 4, 5))
    kept = distances.argmin(dim=0)
    assert float(distances.amin(dim=0).max()) < 1e-4 * float(both.abs().max())
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert figures["groups_from_upper"] == pytest.approx(float((kept >= groups).float().mean()))
    assert 0 < figures["attention_unexplained"] < 1


def scaled(model: Path, out: Path, layer: int, factor: float) -> Path:
    """A copy of a model whose attention in one layer writes so many times as much."""
    out.mkdir()
    for file in model.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    tensors = load_file(out / "model.safetensors")
    tensors[f"model.layers.{layer}.self_attn.o_proj.weight"] *= factor
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def test_the_layer_whose_attention_matters_keeps_its_heads(pico_llama, tmp_path):
    for layer, expected in ((LOWER, 0.0), (UPPER, 1.0)):
        model = scaled(pico_llama, tmp_path / f"quiet-{layer}", LOWER + UPPER - layer, 1e-3)
        trajectory = Trajectory(LayerRunner(Checkpoint.open(model)), IDS, tmp_path / f"states-{layer}")
        _, figures = compete_heads(trajectory, LOWER, UPPER)
        assert figures["groups_from_upper"] == expected


def test_the_plan_says_where_the_heads_are_from(pico_llama, tmp_path):
    out = merged(pico_llama, tmp_path / "out", settings())
    for step in json.loads((out / "plan.json").read_text())["steps"]:
        assert 0 <= step["figures"]["groups_from_upper"] <= 1
