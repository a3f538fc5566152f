"""``mka-export check --config``: several artifacts, their limits and the data in one file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from command import type_in
from mmlu_data import write_mmlu
from pico import REPOSITORY

from mka_export.data import data_folder
from mka_export.options import MmluOptions, TextOptions
from mka_export.pipeline import measuring
from mka_export.pipeline.configured import read_config
from mka_export.target import Limits, load_target

SMALL = ["--window-tokens", "64", "--device", "cpu", "--quiet"]
CONFIG = """
model = "pico"
text = "text.txt"
windows = 6

[[artifacts]]
path = "made/pico-F16.gguf"
target = "gguf-f16"

[[artifacts]]
name = "eight-bits"
path = "made/pico-Q8_0.gguf"
checkpoint = "merged"
[artifacts.conversion]
max_mean_kl = 0.5
[artifacts.compression]
max_mean_kl = 1e-9

[mmlu]
source = "mmlu"
questions = 9
shots = 1
"""


@pytest.fixture(scope="module")
def folder(pico_llama, tmp_path_factory) -> Path:
    """A model, a merged one, artifacts, a text and questions."""
    folder = tmp_path_factory.mktemp("check")
    shutil.copytree(pico_llama, folder / "pico")
    small = [*SMALL, "--windows", "6", "--calibration-tokens", "512"]
    run = [folder / "pico", "--ratio", "0.2", "--protect", "1", "--to", "gguf-q8", "--out", folder / "run", *small]
    assert type_in(*run).exit_code in (0, 3, 4)
    assert type_in("convert", folder / "pico", "--to", "gguf-f16", "--out", folder / "one", *small).exit_code in (
        0,
        3,
        4,
    )
    (folder / "made").mkdir()
    shutil.copy(next((folder / "run" / "gguf-q8").glob("*.gguf")), folder / "made" / "pico-Q8_0.gguf")
    shutil.copy(next((folder / "one" / "gguf-f16").glob("*.gguf")), folder / "made" / "pico-F16.gguf")
    (folder / "run" / "merged").rename(folder / "merged")
    shutil.copy(data_folder("sample_prompts") / "evaluation" / "prose.txt", folder / "text.txt")
    write_mmlu(folder / "mmlu")
    (folder / "release.toml").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def done(folder) -> tuple[Result, dict[str, Any]]:
    result = type_in("check", "--config", folder / "release.toml", "--out", folder / "out", *SMALL, "--json")
    return result, json.loads(result.stdout)


def test_all_artifacts_are_in_one_report_each_with_its_limits(done, folder):
    result, report = done
    assert result.exit_code == 3  # the second keeps no limit of 1e-9
    assert [entry["name"] for entry in report["targets"]] == ["pico-F16", "eight-bits"]
    one, eight = report["targets"]
    limits = {name: value for name, value in vars(load_target("gguf-f16").compression).items() if value is not None}
    assert one["comparisons"]["compression"]["limits"] == limits
    assert set(one["comparisons"]) == {"compression"}
    assert eight["comparisons"]["conversion"]["limits"] == {"max_mean_kl": 0.5}
    assert eight["comparisons"]["conversion"]["against"] == "merged"
    assert eight["comparisons"]["compression"]["verdict"] == "fail"
    assert report["evaluation"]["text"] == str(folder / "text.txt")
    assert (report["evaluation"]["windows"], report["evaluation"]["window_tokens"]) == (6, 64)
    assert (report["mmlu"]["source"], report["mmlu"]["questions"]) == (str(folder / "mmlu"), 9)
    assert [step["name"] for step in eight["mmlu"]["steps"]] == ["original", "merged", "artifact"]


def test_a_second_check_does_no_work(done, folder, monkeypatch):
    monkeypatch.setattr(measuring, "open_runtime", None)
    monkeypatch.setattr(measuring, "score", None)
    again = type_in("check", "--config", folder / "release.toml", "--out", folder / "out", *SMALL, "--json")
    assert json.loads(again.stdout)["targets"] == done[1]["targets"]


def test_the_file_names_the_output_folder(done, folder, monkeypatch):
    monkeypatch.chdir(folder)
    shutil.copytree(folder / "out", folder / "release-check")
    again = type_in("check", "--config", "release.toml", *SMALL, "--json")
    assert all(stage["reused"] for stage in json.loads(again.stdout)["stages"])


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('model = "pico"', 'modle = "pico"', "unknown key 'modle': did you mean model?"),
        ('model = "pico"', "", "model is missing"),
        ("windows = 6", "windows = 1", "windows: 1 is not in the range x>=2"),
        ("windows = 6", "windows = true", "windows = True cannot be"),
        ("windows = 6", "windows = 6.5", "windows: '6.5' is not a valid integer range"),
        ('target = "gguf-f16"', 'target = "gguf-f61"', "did you mean gguf-f16?"),
        ('target = "gguf-f16"', 'target = "gguf-f16"\ncompression = {}', "either a target"),
        ("max_mean_kl = 0.5", "max_mean_lk = 0.5", "did you mean max_mean_kl?"),
        ("max_mean_kl = 0.5", "max_mean_kl = -1", "max_mean_kl = -1.0 cannot be"),
        ('checkpoint = "merged"', "", "need the checkpoint"),
        ('name = "eight-bits"', 'nam = "eight-bits"', "unknown key of an artifact 'nam': did you mean name?"),
        ('name = "eight-bits"', 'name = "../x"', "cannot be called '../x'"),
        ('name = "eight-bits"', 'name = "pico-F16"', "several artifacts are called pico-F16"),
        ("shots = 1", "shot = 1", "unknown key 'shot': did you mean shots?"),
        ("shots = 1", "shots = 6", "6 is not in the range 0<=x<=5"),
        ("made/pico-F16.gguf", "made/pico-F61.gguf", "is no .gguf file and no ONNX folder"),
        ("[[artifacts]]", "[[artifcts]]", "did you mean artifacts?"),
        (CONFIG, 'model = "pico"\nartifacts = []', "one at least"),
        (CONFIG, "model = ", "is not valid TOML"),
    ],
)
def test_a_file_that_is_wrong_is_one_line(old, new, words, folder):
    assert old in CONFIG
    path = folder / "wrong.toml"
    path.write_text(CONFIG.replace(old, new, 1) if old != "[[artifacts]]" else CONFIG.replace(old, new))
    result = type_in("check", "--config", path, "--out", folder / "nothing", *SMALL)
    assert result.exit_code in (1, 2)
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (folder / "nothing").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Give ARTIFACT and --against, or --config"),
        (["made/pico-F16.gguf"], "Give ARTIFACT and --against, or --config"),
        (["--against", "pico"], "Give ARTIFACT and --against, or --config"),
        (["--config", "release.toml", "--against", "pico"], "Leave out ARTIFACT and --against"),
        (["made/pico-F16.gguf", "--config", "release.toml"], "Leave out ARTIFACT and --against"),
        (["--config", "absent.toml"], "cannot read absent.toml"),
    ],
)
def test_either_a_file_or_an_artifact(arguments, words, folder, monkeypatch):
    monkeypatch.chdir(folder)
    result = type_in("check", *arguments, *SMALL)
    assert result.exit_code in (1, 2)
    assert words in result.stderr


def test_the_file_in_the_docs_is_one(tmp_path):
    page = (REPOSITORY / "docs" / "parity.md").read_text(encoding="utf-8")
    path = tmp_path / "parity.toml"
    path.write_text(page.split("```toml\n")[1].split("```")[0])
    plan = read_config(path, TextOptions(), MmluOptions())
    assert [each.path for each in plan.artifacts] == [tmp_path / "dist/model-Q4_K_M.gguf", tmp_path / "dist/onnx"]
    assert plan.artifacts[0].compression == load_target("gguf-q4").compression
    assert plan.artifacts[1].compression == Limits(max_ppl_ratio=1.2, max_mmlu_drop=0.05)
    assert plan.mmlu.mmlu == str(tmp_path / "data/mmlu")
