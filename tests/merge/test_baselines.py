"""The methods of others against their definitions, worked out with transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from merge_tools import WINDOWS, merged, settings
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from mka_export.errors import UsageError
from mka_export.merge import choose
from mka_export.merge.views import probe_windows

IDS = torch.from_numpy(WINDOWS)
PROBE = IDS[probe_windows(len(IDS))]
LAYERS, REMOVE = 6, 2


@pytest.fixture(scope="module")
def model(pico_llama) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(pico_llama, dtype=torch.float32)


@pytest.fixture(scope="module")
def boundaries(model) -> list[torch.Tensor]:
    """The stream before the first layer, and after each: (windows, tokens, hidden)."""
    found: list[torch.Tensor] = []
    hooks = [model.model.layers[0].register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))]
    hooks += [layer.register_forward_hook(lambda _m, _i, out: found.append(out)) for layer in model.model.layers]
    with torch.no_grad():
        model(IDS)
    for hook in hooks:
        hook.remove()
    return found


def shallow(pico_llama: Path, out: Path, method: str) -> tuple[Path, list[list[int]]]:
    """Merge, and return the folder and the span of each layer that is left."""
    made = merged(pico_llama, out, settings(remove=REMOVE, method=method, protect=0))
    return made, json.loads((made / "plan.json").read_text())["layers"]


def without(pico_llama: Path, dropped: set[int], ids: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(pico_llama, dtype=torch.float32)
    kept = [layer for i, layer in enumerate(model.model.layers) if i not in dropped]
    model.model.layers = torch.nn.ModuleList(kept)
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def dropped(spans: list[list[int]]) -> set[int]:
    return {layer for first, last in spans for layer in range(first + 1, last + 1)}


def loss(logits: torch.Tensor, ids: torch.Tensor) -> float:
    return float(functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


@pytest.mark.parametrize("method", ["tail", "shortgpt", "pruneme", "sleb"])
def test_a_model_with_dropped_layers_is_the_original_without_them(method, pico_llama, tmp_path):
    out, spans = shallow(pico_llama, tmp_path / "out", method)
    assert len(dropped(spans)) == REMOVE
    found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        logits = found(IDS).logits
    torch.testing.assert_close(logits, without(pico_llama, dropped(spans), IDS), rtol=1e-4, atol=1e-4)


def test_tail_drops_the_last_layers(pico_llama, tmp_path):
    _, spans = shallow(pico_llama, tmp_path / "out", "tail")
    assert dropped(spans) == {LAYERS - 2, LAYERS - 1}


def test_shortgpt_drops_the_layers_of_the_lowest_block_influence(pico_llama, boundaries, tmp_path):
    influence = [
        1 - float(functional.cosine_similarity(boundaries[i], boundaries[i + 1], dim=-1).mean()) for i in range(LAYERS)
    ]
    lowest = set((np.argsort(influence[1:])[:REMOVE] + 1).tolist())
    _, spans = shallow(pico_llama, tmp_path / "out", "shortgpt")
    assert dropped(spans) == lowest


@pytest.mark.parametrize("method", ["pruneme", "replaceme"])
def test_the_block_is_the_one_that_turns_the_stream_least(method, pico_llama, boundaries, tmp_path):
    def angle(start: int) -> float:
        cosine = functional.cosine_similarity(boundaries[start], boundaries[start + REMOVE], dim=-1)
        return float(cosine[:, -1].arccos().mean()) if method == "pruneme" else float(1 - cosine.mean())

    start = min(range(1, LAYERS - REMOVE + 1), key=angle)
    _, spans = shallow(pico_llama, tmp_path / "out", method)
    assert dropped(spans) == set(range(start, start + REMOVE))


def test_sleb_drops_one_after_another_the_layer_that_is_missed_least(pico_llama, tmp_path):
    expected: set[int] = set()
    for _ in range(REMOVE):
        left = [i for i in range(1, LAYERS) if i not in expected]
        expected.add(min(left, key=lambda i: loss(without(pico_llama, {*expected, i}, PROBE), PROBE)))
    _, spans = shallow(pico_llama, tmp_path / "out", "sleb")
    assert dropped(spans) == expected


def test_laco_adds_the_differences(pico_llama, tmp_path):
    out, spans = shallow(pico_llama, tmp_path / "out", "laco")
    before, after = load_file(pico_llama / "model.safetensors"), load_file(out / "model.safetensors")
    (step,) = json.loads((out / "plan.json").read_text())["steps"]
    assert step["upper"][1] - step["lower"][0] == REMOVE
    for position, (first, last) in enumerate(spans):
        for name in [n for n in before if n.startswith(f"model.layers.{first}.")]:
            tensor = before[name].clone()
            for layer in range(first + 1, last + 1):
                tensor += before[name.replace(f".{first}.", f".{layer}.", 1)] - before[name]
            found = after[name.replace(f".{first}.", f".{position}.", 1)]
            torch.testing.assert_close(found, tensor, rtol=1e-4, atol=1e-5)


def test_laco_says_that_nothing_collapses(pico_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(choose, "THRESHOLDS", [1.0])  # no cosine is above it
    with pytest.raises(UsageError, match="laco finds no 2 layers"):
        shallow(pico_llama, tmp_path / "out", "laco")


def test_replaceme_folds_the_least_squares_map_into_down_proj(pico_llama, model, boundaries, tmp_path):
    out, spans = shallow(pico_llama, tmp_path / "out", "replaceme")
    position = next(i for i, (first, last) in enumerate(spans) if last > first)
    first, last = spans[position]
    outputs: list[torch.Tensor] = []
    hook = model.model.layers[first].mlp.register_forward_hook(lambda _m, _i, out: outputs.append(out))
    with torch.no_grad():
        model(IDS)
    hook.remove()
    mlp = outputs[0].flatten(0, 1).double()
    target = (boundaries[last + 1] - (boundaries[first + 1] - outputs[0])).flatten(0, 1).double()
    solution = torch.linalg.lstsq(mlp, target).solution
    down = load_file(pico_llama / "model.safetensors")[f"model.layers.{first}.mlp.down_proj.weight"].double()
    found = load_file(out / "model.safetensors")[f"model.layers.{position}.mlp.down_proj.weight"].double()

    def left(weights: torch.Tensor) -> float:
        neurons = torch.linalg.lstsq(down, mlp.T).solution  # any that give this output
        return float((neurons.T @ weights.T - target).square().sum() / target.square().sum())

    best = float((mlp @ solution - target).square().sum() / target.square().sum())
    assert left(found) < 1.05 * best + 1e-6
    assert left(down) > 1.2 * best
