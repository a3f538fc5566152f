"""Distillation of pico models: what it learns, where it stops, and that a killed one ends in the same bytes."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from command import type_in
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mka_export.errors import MkaError
from mka_export.heal import distill as module
from mka_export.heal import teacher as answers
from mka_export.heal.distill import Healed, Healing, distill, divergence_of
from mka_export.heal.teacher import Teacher, ask_teacher, unit
from mka_export.models.checkpoint import Checkpoint
from mka_export.models.runner import LayerRunner
from mka_export.progress import Progress

QUIET = Progress(quiet=True)
IDS = torch.from_numpy(np.random.default_rng(3).integers(3, 600, size=(40, 32)))
HEALING = Healing(steps=12, batch=4, rate=1e-3, train="all", every=4)
SMALL = ["--windows", "6", "--window-tokens", "64", "--calibration-tokens", "1024", "--device", "cpu", "--quiet"]
HEAL = ["--heal", "distill", "--heal-steps", "4", "--heal-tokens", "20480", "--heal-batch", "1"]


def model(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@pytest.fixture(scope="module")
def shallow(pico_llama, tmp_path_factory) -> Checkpoint:
    """The pico model without two of its layers."""
    out = tmp_path_factory.mktemp("shallow") / "m"
    arguments = ["merge", pico_llama, "--ratio", "0.3", "--method", "tail", "--out", out, *SMALL]
    assert type_in(*arguments).exit_code == 0
    return Checkpoint.open(out / "merged")


@pytest.fixture
def teacher(pico_llama, tmp_path, monkeypatch) -> Teacher:
    monkeypatch.setattr(answers, "TOP", 640)  # all: these models hardly prefer any token
    return ask_teacher(LayerRunner(Checkpoint.open(pico_llama)), IDS, tmp_path, QUIET)


def trained(shallow: Checkpoint, teacher: Teacher, pieces: Path, **changes: object) -> Healed:
    pieces.mkdir(exist_ok=True)
    healing = dataclasses.replace(HEALING, **changes)
    return distill(shallow, IDS, teacher, healing, [3], torch.device("cpu"), pieces, QUIET)


def test_the_teacher_says_what_the_model_says_in_transformers(pico_llama, teacher):
    with torch.no_grad():
        out = model(pico_llama)(IDS, output_hidden_states=True)
    expected = out.logits.log_softmax(-1).topk(640)
    assert np.array_equal(teacher.tokens[..., :3], expected.indices[..., :3].numpy())
    np.testing.assert_allclose(teacher.log_probs, expected.values.numpy(), rtol=2e-3, atol=2e-3)
    normed = model(pico_llama).model.norm(torch.from_numpy(teacher.states.astype(np.float32)))
    torch.testing.assert_close(normed, out.hidden_states[-1], rtol=5e-3, atol=5e-3)


def test_the_teacher_is_asked_once(pico_llama, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(LayerRunner, "hidden_states", lambda *_: pytest.fail("asked again"))
    again = ask_teacher(LayerRunner(Checkpoint.open(pico_llama)), IDS, tmp_path, QUIET)
    assert np.array_equal(again.tokens, teacher.tokens)
    (tmp_path / "teacher-states.bin").write_bytes(b"damaged")
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        ask_teacher(LayerRunner(Checkpoint.open(pico_llama)), IDS, tmp_path, QUIET)


def test_divergence_over_all_tokens_is_the_kl():
    p, q = (torch.randn(5, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    whole = float((p.exp() * (p - q)).sum(-1).mean())
    assert float(divergence_of(p, q)) == pytest.approx(whole, rel=1e-6)
    some = float(divergence_of(p[:, :12], q[:, :12]))
    rest_p, rest_q = (1 - x[:, :12].exp().sum(-1) for x in (p, q))
    expected = (p[:, :12].exp() * (p - q)[:, :12]).sum(-1) + rest_p * (rest_p / rest_q).log()
    assert some == pytest.approx(float(expected.mean()), rel=1e-5)
    assert some <= whole


def losses(path_or_weights: Path, shallow: Checkpoint, pico_llama: Path, windows: list[int]) -> tuple[float, float]:
    """KL over the whole vocabulary, and the distance of the last hidden states, by transformers."""
    student, original = model(shallow.path), model(pico_llama)
    if path_or_weights != shallow.path:
        student.load_state_dict(load_file(path_or_weights), strict=False)
    seen: list[Tensor] = []
    for each in (original, student):
        each.model.norm.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        p, q = (each(IDS[windows]).logits.double().log_softmax(-1) for each in (original, student))
    divergence = float((p.exp() * (p - q)).sum(-1).mean())
    return divergence, float((unit(seen[0]) - unit(seen[1])).square().mean())


def test_it_learns_what_the_original_says(shallow, teacher, pico_llama, tmp_path):
    healed = trained(shallow, teacher, tmp_path / "p", steps=40)
    held_out = list(range(10, 40, 20))
    before, _ = losses(shallow.path, shallow, pico_llama, held_out)
    after, _ = losses(healed.weights, shallow, pico_llama, held_out)
    assert healed.held_out[0] == pytest.approx(before, rel=0.02)
    assert healed.held_out[healed.best] == pytest.approx(after, rel=0.02)
    assert healed.best > 0
    assert after < 0.9 * before


def test_a_step_is_adamw_on_the_loss_as_defined(shallow, teacher, pico_llama, tmp_path):
    healed = trained(shallow, teacher, tmp_path / "p", steps=1, batch=38)
    windows = [i for i in range(40) if i not in (10, 30)]
    divergence, distance = losses(shallow.path, shallow, pico_llama, windows)
    assert healed.losses == [pytest.approx(divergence + distance, rel=0.02)]
    # AdamW's first step moves every weight by the rate, in the direction of its gradient's sign.
    before, after = model(shallow.path).state_dict(), load_file(tmp_path / "p" / "training-1.safetensors")
    moved = (after["weight.model.layers.0.mlp.up_proj.weight"] - before["model.layers.0.mlp.up_proj.weight"]).abs()
    assert float(moved.median()) == pytest.approx(HEALING.rate, rel=0.01)


def test_only_merged_layers_are_trained_where_that_is_asked(shallow, teacher, tmp_path):
    healed = trained(shallow, teacher, tmp_path / "p", train="merged")
    before, after = model(shallow.path).state_dict(), load_file(healed.weights)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if name.startswith("model.layers.3.")}


def test_it_stops_when_the_held_out_text_gets_no_easier(shallow, teacher, tmp_path):
    healed = trained(shallow, teacher, tmp_path / "p", steps=400, rate=0.5, every=2)
    assert healed.best == 0
    assert len(healed.losses) == 2 * HEALING.patience
    for name, tensor in load_file(healed.weights).items():
        assert torch.equal(tensor, model(shallow.path).state_dict()[name])


@pytest.mark.parametrize("at", ["after a step", "while the state is written", "before the state is sealed"])
def test_killed_and_run_again_it_ends_in_the_same_bytes(at, shallow, teacher, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    undisturbed = trained(shallow, teacher, tmp_path / "whole")
    with monkeypatch.context() as patch:
        if at == "after a step":
            step, calls = module._Training.step, []
            patch.setattr(
                module._Training, "step", lambda self: calls.append(0) or step(self) if len(calls) < 7 else _die(Killed)
            )
        elif at == "while the state is written":
            save, calls = module.save_tensors, []
            patch.setattr(
                module, "save_tensors", lambda t, p: calls.append(0) or save(t, p) if len(calls) < 5 else _die(Killed)
            )
        else:
            seal, calls = module.seal, []
            patch.setattr(
                module, "seal", lambda f, a: calls.append(0) or seal(f, a) if len(calls) < 5 else _die(Killed)
            )
        with pytest.raises(Killed):
            trained(shallow, teacher, tmp_path / "killed")
    steps, counted = module._Training.step, []
    monkeypatch.setattr(module._Training, "step", lambda self: counted.append(0) or steps(self))
    again = trained(shallow, teacher, tmp_path / "killed")
    assert again.weights.read_bytes() == undisturbed.weights.read_bytes()
    assert (again.losses, again.held_out) == (undisturbed.losses, undisturbed.held_out)
    assert len(counted) == 8  # what was finished at step 4 is not done again


def _die(kind: type[BaseException]) -> None:
    raise kind


def test_inner_values_made_again_change_nothing(shallow, teacher, tmp_path, monkeypatch):
    plain = trained(shallow, teacher, tmp_path / "a", steps=3)
    monkeypatch.setattr(module, "CHECKPOINTED", 0)
    again = trained(shallow, teacher, tmp_path / "b", steps=3)
    assert again.losses == pytest.approx(plain.losses, rel=1e-5)


def test_a_loss_that_is_no_number_is_one_line(shallow, teacher, tmp_path):
    broken = dataclasses.replace(teacher, log_probs=np.full_like(teacher.log_probs, np.nan))
    with pytest.raises(MkaError, match=r"the loss is nan on held-out text. Lower --heal-rate"):
        trained(shallow, broken, tmp_path / "p")


def test_the_main_job_heals_and_says_so(pico_llama, tmp_path):
    out = tmp_path / "out"
    job = [pico_llama, "--ratio", "0.3", "--protect", "1", *HEAL, "--to", "gguf-q8", "--out", out, *SMALL]
    result = type_in(*job, "--json", "--max-ppl-ratio", "100", "--conversion-max-mean-kl", "1")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    (target,) = report["targets"]
    assert [step["name"] for step in target["steps"]] == ["original", "merged", "healed", "artifact"]
    assert target["comparisons"]["conversion"]["against"] == "healed"
    assert target["comparisons"]["compression"]["against"] == "original"
    assert len(report["heal"]["losses"]) == 4
    assert {look["step"] for look in report["heal"]["held_out"]} == {0, 4}
    assert (out / "healed" / "losses.png").read_bytes().startswith(b"\x89PNG")
    healed = Checkpoint.open(out / "healed")
    assert healed.num_layers == 4
    assert math.isfinite(float(model(healed.path)(IDS[:1]).logits.sum()))
    table = type_in(*job, "--max-ppl-ratio", "100", "--conversion-max-mean-kl", "1").stdout
    assert "Healed    by distillation, 4 steps" in table


def test_healing_is_forecast(pico_llama, tmp_path):
    job = [
        "merge",
        pico_llama,
        "--ratio",
        "0.3",
        "--protect",
        "1",
        "--out",
        tmp_path / "out",
        *SMALL,
        "--dry-run",
        "--json",
    ]
    plain, found = (json.loads(type_in(*job, *more).stdout)["stages"] for more in ([], HEAL))
    assert set(found) - set(plain) == {"healed", "parity/healed"}
    assert found["healed"]["memory"] > 16 * 10**5


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--heal-tokens", "4096"], 1, "distilling needs at least 20 windows of 512 tokens, the text has 8"),
        (["--heal", "distil"], 2, "'distil' is not one of 'none', 'distill'"),
        (["--heal-rate", "0"], 2, "--heal-rate"),
    ],
)
def test_what_cannot_be_is_one_line(arguments, code, message, pico_llama, tmp_path):
    result = type_in(
        "merge", pico_llama, "--ratio", "0.3", "--protect", "1", "--out", tmp_path, *SMALL, *HEAL, *arguments
    )
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_too_little_memory_is_said_before_it_starts(pico_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("mka_export.pipeline.job.free_memory", lambda: 10**8)
    result = type_in("merge", pico_llama, "--ratio", "0.3", "--protect", "1", "--out", tmp_path, *SMALL, *HEAL)
    assert result.exit_code == 1
    assert "distilling holds the whole merged model, and needs" in result.stderr
