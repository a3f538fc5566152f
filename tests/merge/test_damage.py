"""The choice of ``mka``: damage measured on trial decides, fits go bottom up, and what was measured is kept."""

from __future__ import annotations

import json

import pytest
import torch
from merge_tools import CALIBRATION, QUIET, WINDOWS, merged, settings
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mka_export.merge import damage
from mka_export.merge.compete import compete
from mka_export.merge.stage import trial
from mka_export.merge.steps import Choice, Step
from mka_export.merge.trajectory import Trajectory
from mka_export.merge.views import ECHO, Views, probe_windows
from mka_export.models.checkpoint import Checkpoint
from mka_export.models.runner import LayerRunner

IDS = torch.from_numpy(WINDOWS)
THREE = settings(remove=3, protect=0)


def notes_of(pieces) -> dict:
    return json.loads((pieces / f"damages-{len(IDS)}.json").read_text())


@pytest.fixture(scope="module")
def plan(pico_llama, tmp_path_factory):
    out = merged(pico_llama, tmp_path_factory.mktemp("damage") / "out", THREE)
    return json.loads((out / "plan.json").read_text()), notes_of(out.with_name("out-pieces"))


@pytest.mark.parametrize("attention", [2, 3])
def test_damage_is_how_much_the_predictions_turn_away(attention, pico_llama, plan, tmp_path):
    """Of one pair, worked out with transformers: fitted to some windows, measured on others, which are said twice."""
    views = Views.of(LayerRunner(Checkpoint.open(pico_llama)), IDS, "npib", tmp_path, tmp_path)
    probed, tried = list(views.probe.windows), list(views.trial.windows)
    assert probed == probe_windows(len(IDS))
    assert not set(probed) & set(tried)
    fused, _ = compete(views.trial, Choice(2, 3, attention=attention))
    original = AutoModelForCausalLM.from_pretrained(pico_llama, dtype=torch.float32)
    shallow = AutoModelForCausalLM.from_pretrained(pico_llama, dtype=torch.float32)
    shallow.model.layers[2].load_state_dict(fused)
    del shallow.model.layers[3]
    for index, layer in enumerate(shallow.model.layers):
        layer.self_attn.layer_idx = index
    shallow.config.num_hidden_layers -= 1
    assert IDS.shape[1] < ECHO
    twice = IDS[probed].repeat(1, 2)
    with torch.no_grad():
        p, q = (m(twice, use_cache=False).logits.double().log_softmax(-1) for m in (original, shallow))
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert plan[1]["damages"][f"[2, 2]+[3, 3], attention of {attention}"] == pytest.approx(expected, rel=1e-3)


def test_the_least_damage_is_chosen_first(plan):
    damages, chosen = plan[1]["damages"], plan[1]["chosen"]
    pairs = {f"[{i}, {i}]+[{i + 1}, {i + 1}], attention of {attention}" for i in range(5) for attention in (i, i + 1)}
    first = {pair: value for pair, value in damages.items() if pair in pairs}
    assert len(first) == len(pairs)
    least = f"{chosen[0]['lower']}+{chosen[0]['upper']}, attention of {chosen[0]['attention']}"
    assert least == min(first, key=first.__getitem__)


def test_only_the_most_similar_are_measured(pico_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(damage, "SCREENED", 1)
    similar = json.loads(
        (merged(pico_llama, tmp_path / "a", settings(method="mka-paper", remove=1)) / "plan.json").read_text()
    )
    out = merged(pico_llama, tmp_path / "b", settings(remove=1))
    assert len(notes_of(tmp_path / "b-pieces")["damages"]) == 2  # with the attention of either
    (ours,), (theirs,) = json.loads((out / "plan.json").read_text())["steps"], similar["steps"]
    assert (ours["lower"], ours["upper"]) == (theirs["lower"], theirs["upper"])


def test_what_was_just_fused_on_trial_is_not_fused_again(pico_llama, tmp_path, monkeypatch):
    """And the layer that stands there is that of the pair that was chosen; nothing of the trials is left."""
    views, fused, kept = Views.of(LayerRunner(Checkpoint.open(pico_llama)), IDS, "npib", tmp_path, tmp_path), {}, {}
    replace = Views.replace_on_trial

    def seen(views, choice, file):
        kept.update(load_file(file))
        replace(views, choice, file)

    def counted(trajectory, choice):
        merge = choice.position, choice.attention
        assert merge not in fused
        fused[merge] = compete(trajectory, choice)[0]
        return fused[merge], {}

    monkeypatch.setattr(Views, "replace_on_trial", seen)
    (choice,) = damage.least_damage(counted, settings(remove=1, protect=0), views)
    assert len(fused) == 10
    expected = fused[choice.position, choice.attention]
    assert kept.keys() == expected.keys()
    assert not [*tmp_path.rglob("chosen-*"), *tmp_path.rglob("merged-*")]
    assert all(torch.equal(kept[name], tensor) for name, tensor in expected.items())


def test_fits_go_bottom_up_and_no_layer_runs_twice(pico_llama, tmp_path, monkeypatch):
    runs, run = [], Trajectory._run

    def counted(self, kind, weights, source, out, note=None):
        if out.path.parent.name == "all":
            runs.append(out.path.name)
        return run(self, kind, weights, source, out, note)

    monkeypatch.setattr(Trajectory, "_run", counted)
    out = merged(pico_llama, tmp_path / "out", THREE)
    plan = json.loads((out / "plan.json").read_text())
    groups = [[step["lower"][0], step["upper"][1]] for step in plan["steps"]]
    assert groups == [[first, last] for first, last in plan["layers"] if first < last]
    assert len(runs) == len(set(runs))


def test_what_becomes_one_layer_is_fused_once():
    pairs = [([4, 4], [5, 5], 0.5, 5), ([1, 1], [2, 2], 0.6, 1), ([3, 3], [4, 5], 0.7, 5)]
    steps = [Step(lower, upper, similarity, 1.0, attention) for lower, upper, similarity, attention in pairs]
    found = [*damage._bottom_up(steps, 7)]
    assert found == [Choice(1, 2, 0.6, 1.0, 1), Choice(2, 4, 0.5, 1.0, 5)]


def test_what_was_measured_is_not_measured_again(pico_llama, plan, tmp_path, monkeypatch):
    """Of a choice that was killed, and for another number of layers: the plan is that of an undisturbed run."""
    measured, divergence = [], damage._Predictions.divergence

    def counted(predictions, states):
        measured.append(0)
        return divergence(predictions, states)

    monkeypatch.setattr(damage._Predictions, "divergence", counted)
    folders = [tmp_path / name for name in ("two", "three", "pieces", "states")]
    for folder in folders:
        folder.mkdir()
    runner = LayerRunner(Checkpoint.open(pico_llama))
    two = settings(remove=2, protect=0)
    trial(runner, WINDOWS, CALIBRATION, two, folders[0], *folders[2:], QUIET)
    known = len(notes_of(folders[2])["damages"])
    before = len(measured)
    found, _ = trial(runner, WINDOWS, CALIBRATION, THREE, folders[1], *folders[2:], QUIET)
    new = len(notes_of(folders[2])["damages"]) - known
    assert len(measured) - before == new + (new > 0)  # and the model as it is, once a round
    assert found.to_dict()["steps"] == plan[0]["steps"]
