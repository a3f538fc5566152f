"""Merging a pico model: the result in transformers, the plan, the cost."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from merge_tools import QUIET, WINDOWS, merged, settings
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mka_export.errors import UsageError
from mka_export.merge.measures import MEASURES
from mka_export.merge.methods import METHODS
from mka_export.merge.plan import read_plan
from mka_export.merge.stage import layers_to_remove
from mka_export.merge.steps import Choice
from mka_export.merge.trajectory import Trajectory
from mka_export.merge.views import probe_windows
from mka_export.models.activations import Activations, calibrate
from mka_export.models.checkpoint import Checkpoint
from mka_export.models.runner import LayerRunner


def logits(path: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.from_numpy(WINDOWS)).logits


ONE_SHOT = {"schedule": "one-shot"}
OTHERS = [(name, {}) for name in METHODS if not METHODS[name].measured]


@pytest.mark.parametrize("family", ["pico_llama", "pico_qwen2"])
@pytest.mark.parametrize(
    ("method", "how"), [("mka", {}), ("mka-paper", {}), ("mka", ONE_SHOT), ("mka-paper", ONE_SHOT), *OTHERS]
)
def test_result_loads_in_transformers_with_fewer_layers(family, method, how, request, tmp_path):
    model = request.getfixturevalue(family)
    out = merged(model, tmp_path / "out", settings(method=method, **how))
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == 4
    assert len(config.get("layer_types") or [None] * 4) == 4
    plan = json.loads((out / "plan.json").read_text())
    assert len(plan["layers"]) == 4
    assert plan["layers"][0] == [0, 0]
    assert torch.isfinite(logits(out)).all()
    # Our own runner and transformers agree on the file that was written.
    runner = LayerRunner(Checkpoint.open(out))
    ours = runner.logits(runner.hidden_states(torch.from_numpy(WINDOWS)))
    torch.testing.assert_close(ours, logits(out), rtol=1e-4, atol=1e-4)
    assert (out / "similarity.png").stat().st_size > 5000


def test_refitted_layers_stay_closer_to_the_original_than_averaged_ones(pico_llama, tmp_path):
    original = torch.log_softmax(logits(pico_llama), -1)

    def divergence(method):
        found = torch.log_softmax(logits(merged(pico_llama, tmp_path / method, settings(method=method))), -1)
        return float((original.exp() * (original - found)).sum(-1).mean())

    assert divergence("mka") < 0.7 * divergence("mka-paper")


def test_average_is_the_papers_formula(pico_qwen2, tmp_path):
    out = merged(pico_qwen2, tmp_path / "out", settings(remove=1, method="mka-paper", alpha=0.75))
    (step,) = json.loads((out / "plan.json").read_text())["steps"]
    lower, upper = step["lower"][0], step["upper"][0]
    before, after = load_file(pico_qwen2 / "model.safetensors"), load_file(out / "model.safetensors")
    names = [n.removeprefix("model.layers.0.") for n in before if n.startswith("model.layers.0.")]
    assert len(names) == 12
    for name in names:
        expected = 0.75 * before[f"model.layers.{lower}.{name}"] + 0.25 * before[f"model.layers.{upper}.{name}"]
        torch.testing.assert_close(after[f"model.layers.{lower}.{name}"], expected)


@pytest.mark.parametrize("measure", MEASURES)
def test_the_measure_chooses(measure, pico_llama, tmp_path):
    out = merged(pico_llama, tmp_path / "out", settings(remove=1, method="mka-paper", measure=measure))
    written = json.loads((out / "similarity.json").read_text())
    (step,) = read_plan(out / "plan.json").steps
    assert written["measure"] == measure
    matrix = np.array(written["before"])
    neighbours = np.diag(matrix, 1)[1:]
    assert step.lower[0] == 1 + int(neighbours.argmax())
    assert step.similarity == pytest.approx(neighbours.max(), abs=1e-5)


def test_alpha_is_the_similarity_by_default(pico_llama, tmp_path):
    plan = read_plan(merged(pico_llama, tmp_path / "out", settings(method="mka-paper")) / "plan.json")
    assert all(step.alpha == step.similarity for step in plan.steps)


def test_same_input_same_bytes_and_a_plan_replays_to_them(pico_llama, tmp_path):
    first = merged(pico_llama, tmp_path / "first", settings())
    again = merged(pico_llama, tmp_path / "again", settings())
    replayed = merged(pico_llama, tmp_path / "replayed", read_plan(first / "plan.json"))
    for name in ("model.safetensors", "plan.json", "config.json", "activations.safetensors", "similarity.png"):
        assert (first / name).read_bytes() == (again / name).read_bytes(), name
        assert (first / name).read_bytes() == (replayed / name).read_bytes(), name


@pytest.mark.parametrize("replayed", [False, True])
def test_a_merge_goes_on_at_its_last_finished_fit(replayed, pico_llama, tmp_path, monkeypatch):
    method, fits = METHODS["mka"], []
    how = settings(remove=3, measure="angular", schedule="one-shot", protect=0)
    undisturbed = merged(pico_llama, tmp_path / "undisturbed", how)
    plan = read_plan(undisturbed / "plan.json")
    assert [step.lower for step in plan.steps] == [[0, 0], [2, 2], [4, 4]]
    how = plan if replayed else how

    def counted(trajectory, choice):
        fits.append(choice)
        if len(fits) == 3:
            raise KeyboardInterrupt
        return method.fuse(trajectory, choice)

    monkeypatch.setitem(METHODS, "mka", dataclasses.replace(method, fuse=counted))
    with pytest.raises(KeyboardInterrupt):
        merged(pico_llama, tmp_path / "out", how)
    shutil.rmtree(tmp_path / "out")
    damaged = tmp_path / "out-pieces" / "pair-2.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    merged(pico_llama, tmp_path / "out", how)
    assert len(fits) == 3 + 2  # the first is taken as it is, the damaged and the last are made
    for name in ("model.safetensors", "plan.json", "activations.safetensors", "similarity.png"):
        assert (undisturbed / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def test_input_is_not_touched(pico_llama, tmp_path):
    before = {p.name: p.read_bytes() for p in pico_llama.iterdir()}
    merged(pico_llama, tmp_path / "out", settings())
    assert {p.name: p.read_bytes() for p in pico_llama.iterdir()} == before


def test_activations_are_those_of_the_merged_model_on_the_probe_windows(pico_llama, tmp_path):
    out = merged(pico_llama, tmp_path / "out", settings())
    probe = torch.from_numpy(WINDOWS[probe_windows(len(WINDOWS))])
    kept = Activations.load(out / "activations.safetensors")
    fresh = calibrate(LayerRunner(Checkpoint.open(out)), probe, "0" * 64, QUIET)
    assert kept.tokens == probe.numel()
    assert kept.mean_square.keys() == fresh.mean_square.keys()
    assert len(kept.mean_square) == 4 * 7
    for name, value in fresh.mean_square.items():
        torch.testing.assert_close(kept.mean_square[name], value, rtol=1e-3, atol=1e-5)


def same(trajectory: Trajectory, position: int) -> None:
    """Replace two layers by the lower one."""
    file = trajectory.folder / f"{position}.safetensors"
    save_file(trajectory.weights(position), file)
    trajectory.replace(Choice(position, position + 1), file)


def test_a_merge_runs_only_the_layers_after_it(pico_llama, tmp_path):
    trajectory = Trajectory(LayerRunner(Checkpoint.open(pico_llama)), torch.from_numpy(WINDOWS), tmp_path / "s")
    everything, nodes = slice(0, 8), torch.tensor([[0, 1], [3, 4]])
    trajectory.before(3, everything)
    assert trajectory.layer_runs == 3
    trajectory.original(5, everything)
    assert trajectory.layer_runs == 5
    same(trajectory, 3)
    trajectory.nodes_after(4, nodes)
    assert trajectory.layer_runs == 5 + 2  # the new layer 3, and layer 5, now at 4
    trajectory.nodes_after(0, nodes)
    trajectory.before(4, everything)
    assert trajectory.layer_runs == 5 + 2
    same(trajectory, 1)
    trajectory.before(3, everything)
    assert trajectory.layer_runs == 5 + 2 + 2


def test_the_originals_states_are_taken_from_a_run_that_was_killed(pico_llama, tmp_path):
    everything, ids = slice(0, 8), torch.from_numpy(WINDOWS)

    def again(ids: torch.Tensor) -> Trajectory:
        return Trajectory(LayerRunner(Checkpoint.open(pico_llama)), ids, tmp_path / "s")

    killed = again(ids)
    killed.before(4, everything)
    same(killed, 2)
    killed.before(3, everything)
    resumed = again(ids)
    states, told = resumed.before(6, everything), resumed.activations("").mean_square
    assert resumed.layer_runs == 2
    assert resumed.largest_updates() == killed.largest_updates()
    flipped = tmp_path / "s" / "original-3.f32"
    data = flipped.read_bytes()
    flipped.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (tmp_path / "s" / "original-5.statistics").unlink()
    mended = again(ids)
    assert torch.equal(mended.before(6, everything), states)
    assert mended.layer_runs == 2
    for name, mean_square in mended.activations("").mean_square.items():
        assert torch.equal(mean_square, told[name])
    others = again(ids.flip(0))
    assert torch.equal(others.before(6, everything), states.flip(0))
    assert others.layer_runs == 6


def test_states_after_a_merge_are_those_of_the_merged_model(pico_llama, tmp_path):
    runner = LayerRunner(Checkpoint.open(pico_llama))
    trajectory = Trajectory(runner, torch.from_numpy(WINDOWS), tmp_path / "s")
    before = trajectory.original(4, slice(0, 8)).clone()
    same(trajectory, 2)
    states = runner.embed(torch.from_numpy(WINDOWS))
    for index in (0, 1, 2, 4):
        states = runner.run_layer(index, runner.weights(index), states)
    torch.testing.assert_close(trajectory.before(4, slice(0, 8)), states, rtol=1e-5, atol=1e-5)
    # What later layers should see is still the original's.
    assert torch.equal(trajectory.original(4, slice(0, 8)), before)


@pytest.mark.parametrize(
    ("ratio", "layers", "removed"), [(0.1, 30, 3), (0.4, 32, 13), (0.25, 30, 8), (0.01, 30, 1), (0.5, 5, 3)]
)
def test_ratio_rounds_to_the_nearest_layer_halves_up(ratio, layers, removed):
    assert layers_to_remove(ratio, layers, 0) == removed


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, float("nan"), float("inf")])
def test_a_ratio_that_is_no_share_is_refused(ratio):
    with pytest.raises(UsageError, match="between 0 and 1"):
        layers_to_remove(ratio, 30, 0)


def test_a_ratio_that_reaches_the_protected_layers_is_refused():
    with pytest.raises(UsageError, match="at most 5 can go"):
        layers_to_remove(0.9, 10, 4)
