"""``compare`` as it is typed: what it finds, what it shares, and how it goes on."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from command import type_in
from transformers import AutoModelForCausalLM

from mka_export.cli import main
from mka_export.inputs import read_texts, windows_of
from mka_export.merge import choose
from mka_export.merge.finished import Finished
from mka_export.merge.trajectory import Trajectory
from mka_export.models.tokenizer import load_tokenizer
from mka_export.options import TextOptions

SMALL = ["--windows", "6", "--window-tokens", "64", "--calibration-tokens", "1024", "--device", "cpu"]
RATIOS = ["--ratios", "0.17,0.34", "--protect", "1"]


def comparison(model: Path, out: Path, *arguments: object) -> dict:
    result = type_in("compare", model, "--out", out, "--json", *RATIOS, *SMALL, *arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads((out / "comparison.json").read_text())
    return found


@pytest.fixture(scope="module")
def everything(pico_llama, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("compare") / "out"
    return out, comparison(pico_llama, out, "--quiet")


def losses(model: Path, original: Path) -> np.ndarray:
    """Mean loss of each evaluation window, by transformers."""
    evaluation = read_texts(TextOptions()).evaluation
    ids = torch.from_numpy(windows_of(evaluation, load_tokenizer(original), 6, 64).ids)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return loss.double().mean(dim=1).numpy()


def test_all_methods_are_measured_at_every_ratio(everything):
    out, found = everything
    names = ["mka", "mka-paper", "tail", "shortgpt", "pruneme", "sleb", "laco", "replaceme", "mka-paper:one-shot"]
    assert [(row["name"], row["layers"]) for row in found["results"]] == [
        (n, layers) for n in names for layers in (5, 4)
    ]
    for row in found["results"]:
        for key in ("ppl_ratio", "mean_kl", "top1"):
            assert row[key]["low"] <= row[key]["value"] <= row[key]["high"]
        assert row["seconds"] >= 0
        assert 10**7 < row["peak_memory_bytes"] < 10**10
        assert row["perplexity"] / found["original"]["perplexity"] == pytest.approx(row["ppl_ratio"]["value"])
        assert row["bits_per_byte"] / found["original"]["bits_per_byte"] == pytest.approx(
            math.log(row["perplexity"]) / math.log(found["original"]["perplexity"])
        )
    (tail,) = (row for row in found["results"] if (row["name"], row["layers"]) == ("tail", 4))
    (ours,) = (row for row in found["results"] if (row["name"], row["layers"]) == ("mka", 4))
    assert tail["ppl_against"]["value"] == pytest.approx(tail["perplexity"] / ours["perplexity"])
    assert ours["ppl_against"] is None
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "comparison.svg").read_text().count("mka-paper:one-shot") >= 1


@pytest.mark.parametrize(("name", "flags"), [("sleb", ()), ("mka-paper:one-shot", ())])
def test_figures_are_those_of_the_checkpoint_that_the_plan_makes(name, flags, everything, pico_llama, tmp_path):
    out, found = everything
    plan = out / name / "4-layers" / "plan.json"
    result = type_in("merge", pico_llama, "--plan", plan, "--out", tmp_path / "m", *SMALL, "--quiet")
    assert result.exit_code == 0, result.output
    merged, original = losses(tmp_path / "m" / "merged", pico_llama), losses(pico_llama, pico_llama)
    (row,) = (row for row in found["results"] if (row["name"], row["layers"]) == (name, 4))
    assert row["perplexity"] == pytest.approx(math.exp(merged.mean()), rel=1e-4)
    assert row["perplexity_se"] == pytest.approx(math.exp(merged.mean()) * merged.std(ddof=1) / math.sqrt(6), rel=1e-3)
    assert row["ppl_ratio"]["value"] == pytest.approx(math.exp((merged - original).mean()), rel=1e-4)


def test_only_what_is_missing_is_made_and_nothing_of_the_work_is_left(everything, pico_llama):
    out, found = everything
    assert not list(out.glob("**/*.safetensors")), "merged checkpoints are not kept"
    assert not list(out.glob("**/.*.pieces")), "neither are states"
    assert type_in("verify", out).exit_code == 0
    shutil.rmtree(out / "tail" / "4-layers")
    result = type_in("compare", pico_llama, "--out", out, *RATIOS, *SMALL)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("there already, kept") == 18  # of 18 results and the original's
    again = json.loads((out / "comparison.json").read_text())
    for old, new in zip(found["results"], again["results"], strict=True):
        assert old == new | {key: old[key] for key in ("seconds", "peak_memory_bytes")}
    assert "mka-paper:one-shot" in result.stdout


def test_methods_share_the_dense_pass_and_ratios_the_merges(pico_llama, tmp_path, monkeypatch):
    runs, fused = [], []
    run, add = Trajectory._run, Finished.add

    def counted_run(self, kind, weights, source, out, note=None):
        if note is not None:
            runs.append(out.path)
        return run(self, kind, weights, source, out, note)

    def counted_add(self, step, fuse):
        return add(self, step, lambda: fused.append(step) or fuse())

    monkeypatch.setattr(Trajectory, "_run", counted_run)
    monkeypatch.setattr(Finished, "add", counted_add)
    ratios = ["--ratios", "0.17,0.34,0.5", "--methods", "mka-paper,sleb", "--protect", "1"]
    tokens = ["--calibration-tokens", "4096"]  # more windows than the probe has
    assert type_in("compare", pico_llama, "--out", tmp_path / "out", *SMALL, *ratios, *tokens).exit_code == 0
    assert len(runs) == len(set(runs)) == 4 * 6  # all windows, the probe, the echo and the trial, through six layers
    assert len(fused) == 2 * 3  # of each method as many as the highest ratio takes


def test_a_method_that_cannot_is_a_row_and_not_the_end(pico_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(choose, "THRESHOLDS", [2.0])  # above every cosine
    chosen = ["--methods", "laco,tail", *RATIOS, *SMALL]
    result = type_in("compare", pico_llama, "--out", tmp_path / "out", *chosen)
    assert result.exit_code == 0, result.output
    assert "laco, 4 layers: laco finds no 2 layers to remove" in result.stdout
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert ["error" in row for row in found["results"]] == [True, True, False, False]
    assert found["results"][2]["ppl_against"] is None  # ours was not asked for


def test_killed_and_run_again_it_finds_the_same(everything, pico_llama, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    add = Finished.add

    def killed(self, step, fuse):
        if len(self.steps) == 1:
            raise Killed
        return add(self, step, fuse)

    monkeypatch.setattr(Finished, "add", killed)
    with pytest.raises(Killed):
        CliRunner().invoke(
            main,
            ["compare", str(pico_llama), "--out", str(tmp_path), *RATIOS, *SMALL, "--methods", "mka"],
            catch_exceptions=False,
        )
    monkeypatch.undo()
    assert (tmp_path / ".mka.pieces" / "pair-1.safetensors").is_file()
    found = comparison(pico_llama, tmp_path, "--quiet", "--methods", "mka")
    expected = [row for row in everything[1]["results"] if row["name"] == "mka"]
    for old, new in zip(expected, found["results"], strict=True):
        assert old == new | {key: old[key] for key in ("seconds", "peak_memory_bytes")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "mka,slab"], "unknown --methods 'slab'"),
        (["--methods", "sleb:one-shot"], "sleb has its own way to choose"),
        (["--methods", "mka:sometimes"], "unknown --methods 'mka:sometimes'"),
        (["--ratios", "0.1,a"], "--ratios 0.1,a: they are numbers with commas between"),
        (["--ratios", "0.1,1.5"], "--ratios 1.5: it is the share of layers to remove"),
        (["--ratios", "0.9"], "with the first 4 protected"),
        (["--measure", "npid"], "unknown --measure 'npid'"),
    ],
)
def test_what_cannot_be_is_one_line(arguments, message, pico_llama, tmp_path):
    result = type_in("compare", pico_llama, "--out", tmp_path / "out", *SMALL, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
