"""``--attribute``: what rounding lost, told from what the runtime does."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from command import type_in
from mmlu_data import write_mmlu
from pico import make_pico

from mka_export.models.checkpoint import Checkpoint
from mka_export.models.outline import Outline
from mka_export.target import load_converter, load_target

SMALL = ["--windows", "6", "--window-tokens", "64", "--calibration-tokens", "1024", "--device", "cpu", "--quiet"]
RUN = ["--ratio", "0.25", "--protect", "1", "--to", "gguf-q4", "--attribute", *SMALL, "--json"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """Rows that fit the blocks of all types, so that the mix follows the layers."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8}
    return make_pico(tmp_path_factory.mktemp("wide") / "wide", "llama", **shape)


@pytest.fixture(scope="module")
def done(wide, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("attribute") / "out"
    result = type_in(wide, *RUN, "--out", out)
    assert result.exit_code in (0, 3, 4), result.output
    return out, json.loads(result.stdout)


def test_the_weights_of_the_artifact_are_a_step_of_their_own(done):
    out, report = done
    (target,) = report["targets"]
    steps = ["original", "merged", "quantized", "artifact"]
    assert [step["name"] for step in target["steps"]] == steps
    assert target["steps"][2]["runtime"] == "torch"
    assert target["comparisons"]["conversion"]["against"] == "merged"
    (ln_ppl,) = target["attribution"]
    change = {step["name"]: step["change"]["value"] for step in ln_ppl["steps"]}
    total = math.log(target["comparisons"]["compression"]["ppl_ratio"]["value"])
    assert sum(change.values()) == pytest.approx(total)
    with np.load(out / "quantized" / "gguf-q4" / "scores.npz") as scores:
        quantized = scores["nll/quantized"].astype(float)
    with np.load(out / "parity" / "gguf-q4" / "scores.npz") as scores:
        rounding, runtime = quantized - scores["nll/merged"], scores["nll/artifact"] - quantized
    assert change["quantized"] == pytest.approx(rounding.mean())
    assert change["artifact"] == pytest.approx(runtime.mean())
    # llama.cpp computes what is in the file, but for activations, which it rounds to 8 bits.
    assert 0 < 3 * np.abs(runtime).mean() < np.abs(rounding).mean()


def test_the_mix_of_the_original_is_said(done, wide):
    (target,) = done[1]["targets"]
    details = target["artifact"]["details"]
    expected = load_converter("gguf").bits_per_weight(
        Outline.of_checkpoint(Checkpoint.open(wide)), load_target("gguf-q4")
    )
    assert details["bits_per_weight_of_original"] == pytest.approx(expected)
    assert details["bits_per_weight"] != expected  # six layers get another mix than eight


def test_the_unpacked_weights_are_gone_and_a_second_run_does_not_need_them(done, wide):
    out, report = done
    assert [path.name for path in (out / "quantized").iterdir()] == ["gguf-q4"]
    assert not list((out / "quantized").rglob("*.safetensors"))
    again = json.loads(type_in(wide, *RUN, "--out", out).stdout)
    assert all(stage["reused"] for stage in again["stages"])
    assert again["targets"] == report["targets"]


def test_without_it_nothing_is_measured_again(done, wide):
    out, _ = done
    result = json.loads(type_in(wide, *[a for a in RUN if a != "--attribute"], "--out", out).stdout)
    assert all(stage["reused"] for stage in result["stages"])
    assert [step["name"] for step in result["targets"][0]["steps"]] == ["original", "merged", "artifact"]


def test_the_weights_are_asked_too_and_nothing_is_measured_again(done, wide, tmp_path, update):
    out, report = done
    questions = ["--mmlu", write_mmlu(tmp_path / "mmlu"), "--mmlu-questions", "9", "--mmlu-shots", "1"]
    found = json.loads(type_in(wide, *RUN, *questions, "--out", out).stdout)
    steps = ["original", "merged", "quantized", "artifact"]
    (target,) = found["targets"]
    assert [step["name"] for step in target["mmlu"]["steps"]] == steps
    assert target["mmlu"]["comparisons"]["conversion"]["against"] == "merged"
    ln_ppl, mmlu = target["attribution"]
    assert ln_ppl == report["targets"][0]["attribution"][0]
    right = {step["name"]: step["accuracy"]["value"] for step in target["mmlu"]["steps"]}
    assert [step["name"] for step in mmlu["steps"]] == steps[1:]
    for step in mmlu["steps"]:
        assert step["change"]["value"] == pytest.approx(right[step["name"]] - right[step["against"]])
    made = {stage["name"] for stage in found["stages"] if not stage["reused"]}
    assert made == {"mmlu/original", "mmlu/merged", "mmlu/quantized/gguf-q4", "mmlu/targets/gguf-q4"}
    assert not [path for path in out.rglob("*.safetensors") if "quantized" in path.parts]
    assert not list(out.rglob(".*.pieces"))
    again = json.loads(type_in("report", out, "--json", "--quiet").stdout)
    assert again["targets"] == found["targets"]
    assert type_in("verify", out, "--quiet").exit_code == 0
    # What reads the weights back has another version: the artifact comes out the same, and is not measured again.
    update("gguf")
    anew = json.loads(type_in(wide, *RUN, *questions, "--out", out).stdout)
    made = {stage["name"] for stage in anew["stages"] if not stage["reused"]}
    assert made == {"gguf-q4", "quantized/gguf-q4", "mmlu/quantized/gguf-q4"}


def test_the_disk_it_takes_is_forecast(done, wide, tmp_path):
    stages = json.loads(type_in(wide, *RUN, "--out", tmp_path / "out", "--dry-run").stdout)["stages"]
    assert stages["quantized/gguf-q4"]["scratch"] > 2 * Outline.of_checkpoint(Checkpoint.open(wide)).parameters * 0.7
    assert "quantized/gguf-q4" not in [name for name in stages if stages[name]["kept"]]
