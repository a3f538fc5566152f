"""``--ratio auto``: how deep a limit lets it go, and what is said of it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from command import type_in
from mmlu_data import write_mmlu
from transformers import AutoModelForCausalLM

from mka_export.data import data_folder
from mka_export.errors import MkaError, UsageError
from mka_export.inputs import read_texts, windows_of
from mka_export.models.checkpoint import Checkpoint
from mka_export.models.outline import Outline
from mka_export.models.tokenizer import load_tokenizer
from mka_export.options import TextOptions
from mka_export.parity import verdict
from mka_export.parity.statistics import Interval
from mka_export.pipeline import depth
from mka_export.pipeline.depth import Depth, broken_limit, deepest, fewest_that_fit, one_less
from mka_export.target import load_converter, load_target

SMALL = ["--windows", "6", "--window-tokens", "64", "--calibration-tokens", "1024", "--device", "cpu"]
AUTO = ["--ratio", "auto", "--protect", "1", "--to", "gguf-f16"]
LOOSE = ["--conversion-max-mean-kl", "1"]


@pytest.fixture(autouse=True, scope="module")
def informative() -> Iterator[None]:
    """The pico models, which nobody trained, guess worse than chance: here they are taken for models that know something."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(depth, "chance", lambda vocabulary: math.inf)
        patch.setattr(verdict, "_at_chance", lambda *_: False)
        yield


def growing(remove: int) -> Interval:
    return Interval(1 + remove / 10, 0.95 + remove / 10, 1.05 + remove / 10)


@pytest.mark.parametrize("limit", [1.16, 1.26, 1.7, 2.06, 9.0])
def test_the_deepest_is_found_of_which_the_whole_interval_keeps_the_limit(limit):
    tried = []

    def measure(remove: int) -> Interval:
        tried.append(remove)
        return growing(remove)

    found = deepest(measure, limit, 30, 25)
    assert found.remove == max(k for k in range(1, 26) if growing(k).high <= limit)
    assert [30 - k for k in tried] == [each["layers"] for each in found.tried]
    assert len(tried) == len(set(tried)) <= 5
    if found.remove < 25:
        value = growing(found.remove + 1).value
        assert found.limited_by.startswith(f"with {29 - found.remove} it is {value:.4g} (")
    else:
        assert found.limited_by == "5 of 30 cannot go"


def test_what_cannot_be_merged_is_too_deep():
    found = deepest(lambda remove: growing(remove) if remove < 7 else "too few pairs", 9.0, 30, 25)
    assert (found.remove, found.limited_by) == (6, "7 cannot go (too few pairs)")


def test_a_limit_that_no_layer_keeps():
    found = deepest(growing, 1.1, 30, 25)
    assert (found.remove, found.limited_by) == (0, "with 29 it is 1.1 (1.05 to 1.15), in torch")


def entry(outcome: str, value: float | None, error: str | None = None) -> dict:
    check = {"metric": "ppl_ratio", "value": value, "low": 1.5, "high": None, "limit": 1.5, "verdict": outcome}
    other = {"metric": "mean_kl", "value": 9, "low": 9, "high": 9, "limit": 1, "verdict": "fail"}
    comparisons = {"compression": {"checks": [other, check]}}
    return {"comparisons": comparisons, "runtime": {"name": "llama.cpp"}, "error": error}


def test_an_artifact_that_breaks_the_limit_costs_one_layer():
    before = Depth(3, "a limit", "a reason", [])
    failed = {"comparisons": None, "error": "it crashed"}
    assert broken_limit(27, [entry("pass", 1.4), failed, entry("fail", None, "NaN")]) is None
    for outcome in ("fail", "inconclusive"):
        attempt = broken_limit(27, [entry("pass", 1.4), entry(outcome, 1.6)])
        assert attempt == {"layers": 27, "ppl_ratio": {"value": 1.6, "low": 1.5, "high": None}, "runtime": "llama.cpp"}
        found = one_less(before, attempt)
        assert (found.remove, found.limit, found.tried) == (2, "a limit", [attempt])
        assert found.limited_by == "with 27 it is 1.6 (1.5 to no number), in llama.cpp"


def test_no_more_layers_go_than_the_size_asks_for(pico_llama):
    model, target = Outline.of_checkpoint(Checkpoint.open(pico_llama)), load_target("gguf-f16")
    sizes = [load_converter("gguf").need(model.with_layers(6 - k), target).kept for k in range(6)]
    for remove in (1, 2, 4):
        assert fewest_that_fit(model, [target], sizes[remove], 4).remove == remove
        assert fewest_that_fit(model, [target], sizes[remove] + 1, 4).remove == remove
    with pytest.raises(UsageError, match="the artifacts fit as they are"):
        fewest_that_fit(model, [target], sizes[0], 4)
    with pytest.raises(MkaError, match="even with 2 layers gguf-f16 may take"):
        fewest_that_fit(model, [target], sizes[4] - 1, 4)


def test_the_artifact_fits(pico_llama, tmp_path):
    model, target = Outline.of_checkpoint(Checkpoint.open(pico_llama)), load_target("gguf-f16")
    size = load_converter("gguf").need(model.with_layers(4), target).kept
    result = type_in(pico_llama, *AUTO, "--max-size", size, "--out", tmp_path / "out", *SMALL, *LOOSE, "--json")
    assert result.exit_code in (0, 3, 4), result.output
    report = json.loads(result.stdout)
    assert report["targets"][0]["artifact"]["nbytes"] <= size
    assert report["merge"]["layers_after"] == 4
    assert report["merge"]["depth"]["limited_by"].startswith("with 5 layers gguf-f16 may take")
    assert "4 layers are the limit of artifacts of at most" in result.stderr
    again = [pico_llama, *AUTO, "--max-size", size, "--out", tmp_path / "out", *SMALL, "--dry-run", "--json"]
    stages = json.loads(type_in(*again).stdout)["stages"]
    assert not any(value for need in stages.values() for value in need.values())


@pytest.fixture(scope="module")
def searched(pico_llama, tmp_path_factory) -> tuple[Path, Path, dict]:
    folder = tmp_path_factory.mktemp("auto")
    model = Path(shutil.copytree(pico_llama, folder / "pico"))
    result = type_in(model, *AUTO, "--max-ppl-ratio", "9", "--out", folder / "out", *SMALL, *LOOSE, "--json")
    assert result.exit_code == 0, result.output
    return model, folder / "out", json.loads(result.stdout)


def test_each_depth_is_measured_between_the_windows_of_the_verdict(searched):
    model, out, report = searched
    evaluation = read_texts(TextOptions()).evaluation
    tokenizer = load_tokenizer(model)
    windows = windows_of(evaluation, tokenizer, 11, 64).ids
    assert np.array_equal(windows[::2], windows_of(evaluation, tokenizer, 6, 64).ids)
    ids = torch.from_numpy(windows[1::2])
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids, labels=ids).loss
    measured = json.loads((out / "depth" / "original" / "result.json").read_text())["nll"]
    assert len(measured) == 5
    assert float(loss) == pytest.approx(np.mean(measured), rel=1e-5)
    for each in report["merge"]["depth"]["tried"]:
        gone = json.loads((out / "depth" / f"{each['layers']}-layers" / "result.json").read_text())["nll"]
        assert each["ppl_ratio"]["value"] == pytest.approx(math.exp(np.mean(gone) - np.mean(measured)))


def test_what_was_tried_is_what_is_made(searched):
    _, out, report = searched
    left = report["merge"]["layers_after"]
    assert left == min(each["layers"] for each in report["merge"]["depth"]["tried"]) == 2
    assert report["merge"]["depth"]["limited_by"] == "2 of 6 cannot go"
    tried, made = (json.loads((out / p / "plan.json").read_text()) for p in (f"depth/{left}-layers", "merged"))
    assert (tried["layers"], tried["steps"]) == (made["layers"], made["steps"])
    assert json.loads((out / "merged" / "config.json").read_text())["num_hidden_layers"] == left
    assert not [p for p in out.rglob("*.safetensors") if "depth" in p.parts]
    assert not list(out.glob(".*.pieces"))


def test_a_second_run_tries_nothing_again(searched):
    model, out, report = searched
    result = type_in(model, *AUTO, "--max-ppl-ratio", "9", "--out", out, *SMALL, *LOOSE, "--json")
    again = json.loads(result.stdout)
    assert all(stage["reused"] for stage in again["stages"])
    assert again["merge"] == report["merge"]


def test_depths_of_an_earlier_run_do_not_count(searched, tmp_path):
    """Asked for a size, nothing is searched, and no plan of another request is replayed."""
    out = Path(shutil.copytree(searched[1], tmp_path / "out"))
    model, target = Outline.of_checkpoint(Checkpoint.open(searched[0])), load_target("gguf-f16")
    size = load_converter("gguf").need(model.with_layers(2), target).kept
    other = ["--method", "mka-paper", "--max-size", size, "--max-ppl-ratio", "9"]
    report = json.loads(type_in(searched[0], *AUTO, *other, "--out", out, *SMALL, *LOOSE, "--json").stdout)
    assert (report["merge"]["layers_after"], report["merge"]["method"]) == (2, "mka-paper")


def test_artifacts_that_break_the_limit_cost_a_layer_each(pico_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(depth, "deepest", lambda *_: Depth(3, "a limit", "a reason"))
    job = [pico_llama, *AUTO, "--max-ppl-ratio", "0.1", "--out", tmp_path / "out", *SMALL, *LOOSE, "--json"]
    result = type_in(*job)
    assert result.exit_code == 3, result.output  # not even one keeps it: published, and judged
    report = json.loads(result.stdout)
    assert report["merge"]["layers_after"] == 5
    tried = [(each["layers"], each["runtime"]) for each in report["merge"]["depth"]["tried"]]
    assert tried == [(3, "llama.cpp"), (4, "llama.cpp")]
    assert "windows of the verdict" in report["warnings"][0]
    again = json.loads(type_in(*job).stdout)
    assert all(stage["reused"] for stage in again["stages"])
    assert again["merge"] == report["merge"]


def test_what_is_no_better_than_chance_decides_nothing(pico_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(depth, "chance", math.log)
    result = type_in(pico_llama, *AUTO, "--max-ppl-ratio", "9", "--out", tmp_path / "out", *SMALL)
    assert result.exit_code == 1
    assert "no better than chance" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ratio", "auto", "--protect", "1", "--to", "gguf-f16", "--max-ppl-ratio", "0.5"], "no layer can go"),
        (["--ratio", "auto", "--to", "gguf-f16", "--max-ppl-ratio", "2", "--windows", "5"], "5 windows are too few"),
        (["--ratio", "auto", "--to", "gguf-f16", "--windows", "100"], "between those of the verdict"),
        (["--ratio", "auto", "--to", "gguf-f16", "--max-size", "1GB"], "fit as they are"),
    ],
)
def test_bad_requests_are_one_line(pico_llama, tmp_path, arguments, words):
    small = SMALL[4:] if "--windows" in arguments else SMALL
    result = type_in(pico_llama, *arguments, "--out", tmp_path / "out", *small, "--quiet")
    assert result.exit_code in (1, 2)
    assert words in result.stderr.splitlines()[-1]
    assert not list((tmp_path / "out").glob(".*.pieces"))


def test_a_target_without_a_limit_decides_nothing(pico_llama, tmp_path):
    target = tmp_path / "free.toml"
    shipped = (data_folder("targets") / "gguf-f16.toml").read_text()
    target.write_text("".join(line for line in shipped.splitlines(True) if not line.startswith("max_ppl_ratio")))
    result = type_in(pico_llama, "--ratio", "auto", "--to", target, "--out", tmp_path / "out", *SMALL)
    assert result.exit_code != 0
    assert "there is no limit" in result.stderr


def test_it_is_forecast(pico_llama, tmp_path):
    job = [pico_llama, *AUTO, "--max-ppl-ratio", "9", "--out", tmp_path / "out", *SMALL, "--dry-run", "--json"]
    found = json.loads(type_in(*job).stdout)
    assert {"depth", "merged", "gguf-f16"} <= set(found["stages"])
    assert found["stages"]["depth"]["scratch"] > found["stages"]["merged"]["kept"]
    assert (found["method"], found["layers"], found["or_fewer"]) == ("mka", 5, True)
    assert "6 → 5 layers or fewer by mka" in type_in(*job[:-1]).stdout


def test_a_finished_search_is_not_forecast_again(searched):
    model, out, _ = searched
    job = [model, *AUTO, "--max-ppl-ratio", "9", "--out", out, *SMALL, "--dry-run", "--json"]
    assert json.loads(type_in(*job).stdout)["disks"][str(out)]["needed"] == 0


def test_the_search_depends_on_no_questions(searched, tmp_path):
    model, before, report = searched
    out = shutil.copytree(before, tmp_path / "out")
    asked = ["--mmlu", write_mmlu(tmp_path / "mmlu"), "--mmlu-questions", "9", "--mmlu-shots", "0"]
    result = type_in(model, *AUTO, "--max-ppl-ratio", "9", "--out", out, *SMALL, *LOOSE, "--json", *asked)
    again = json.loads(result.stdout)
    assert again["mmlu"]["questions"] == 9
    made = {stage["name"] for stage in again["stages"] if not stage["reused"]}
    assert made == {"mmlu/original", "mmlu/merged", "mmlu/targets/gguf-f16"}
    assert again["merge"] == report["merge"]
