"""The promises of the README, on real models."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from mka_export.cli import main
from mka_export.inputs import windows_of
from mka_export.models.checkpoint import Checkpoint
from mka_export.models.text import load_text
from mka_export.models.tokenizer import load_tokenizer
from mka_export.parity.runtimes.torch_runtime import TorchRuntime

pytestmark = pytest.mark.real
README = Path(__file__).parent.parent / "README.md"


def test_first_command_of_the_readme_passes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = next(line for line in README.read_text().splitlines() if line.startswith("$ mka-export "))
    result = CliRunner().invoke(main, [*shlex.split(command)[2:], "--quiet"])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "smollm2-135m-mka" / "report.json").read_text())
    (target,) = report["targets"]
    assert (report["merge"]["layers_before"], report["merge"]["layers_after"]) == (30, 27)
    assert target["verdict"] == "pass"
    assert target["comparisons"]["compression"]["ppl_ratio"]["high"] <= 1.35
    assert target["artifact"]["nbytes"] < 0.4 * report["model"]["nbytes"]
    folder = tmp_path / "smollm2-135m-mka" / "merged"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert len(model.model.layers) == 27
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    text = tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0])
    assert "Paris" in text


def test_a_model_that_was_merged_to_death_is_said_to_be_dead(tmp_path):
    small = ["--windows", "6", "--window-tokens", "128", "--calibration-tokens", "2048"]
    arguments = [
        "smollm2-135m",
        "--ratio",
        "0.4",
        "--method",
        "mka-paper",
        "--to",
        "gguf-q4",
        "--out",
        tmp_path / "out",
    ]
    result = CliRunner().invoke(main, [*map(str, arguments), *small, "--quiet"])
    assert result.exit_code == 3, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (target,) = report["targets"]
    assert target["tokenizer"]["identical"]
    assert target["comparisons"]["compression"]["ppl_ratio"]["low"] > 2
    assert any("perplexity" in warning for warning in target["warnings"])
    assert "FAIL" in result.stdout


@pytest.mark.parametrize("source", ["real_smollm2", "real_qwen"])
def test_f16_gguf_computes_what_its_checkpoint_does(source, request, tmp_path):
    path = request.getfixturevalue(source)
    small = ["--windows", "8", "--window-tokens", "256", "--json", "--quiet"]
    result = CliRunner().invoke(main, ["convert", str(path), "--to", "gguf-f16", "--out", str(tmp_path / "o"), *small])
    assert result.exit_code == 0, result.output
    (target,) = json.loads(result.stdout)["targets"]
    assert target["tokenizer"]["identical"]
    found = target["comparisons"]["conversion"]
    assert found["kl"]["mean"] < 0.001
    assert found["top1"]["value"] > 0.99


def test_a_fifth_of_the_layers_costs_at_most_1_9_times_the_perplexity(tmp_path, shared_data):
    """32 windows of 512 tokens of WikiText-2's test split, calibrated on its validation split."""
    calibration = shared_data / "wikitext2" / "wiki.valid.unk.txt"
    arguments = ["merge", "smollm2-135m", "--ratio", "0.2", "--calibration", calibration, "--out", tmp_path / "out"]
    few = ["--calibration-tokens", "8192", "--quiet"]  # the default takes some minutes more
    result = CliRunner().invoke(main, [*map(str, arguments), *few])
    assert result.exit_code == 0, result.output
    merged = Checkpoint.open(Path(result.stdout.strip()))
    assert merged.num_layers == 24
    original = Checkpoint.open(_original(tmp_path / "out"))
    text = load_text("evaluation", shared_data / "wikitext2" / "wiki.test.raw")
    ids = windows_of(text, load_tokenizer(original.path), 32, 512).ids

    def mean_loss(checkpoint: Checkpoint) -> float:
        rows = TorchRuntime(checkpoint.path).log_probs(ids)
        return float(np.mean([-p[np.arange(511), w[1:]].mean() for p, w in zip(rows, ids, strict=True)]))

    assert np.exp(mean_loss(merged) - mean_loss(original)) <= 1.9


def _original(out: Path) -> Path:
    from mka_export.models.sources import cache_folder, fetch, resolve
    from mka_export.progress import Progress

    assert (out / "manifest.json").is_file()
    return fetch(resolve("smollm2-135m"), cache_folder(), Progress(quiet=True)).path
