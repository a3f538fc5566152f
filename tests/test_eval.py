"""``eval`` as it is typed: an output folder and single artifacts, on tasks with local data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command import type_in
from local_tasks import DOCUMENTS, PIQA, ROLLING, write_task

from mka_export.pipeline import evaluation
from mka_export.report.terminal import number

SMALL = ["--windows", "6", "--window-tokens", "64", "--calibration-tokens", "1024", "--quiet"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def made(pico_llama, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("eval") / "out"
    loose = ["--max-ppl-ratio", "50", "--conversion-max-mean-kl", "5", "--conversion-max-ppl-ratio", "50"]
    result = type_in("convert", pico_llama, "--to", "gguf-f16", "--to", "gguf-q3", "--out", out, *SMALL, *loose)
    assert result.exit_code in (0, 4), result.output
    return out


@pytest.fixture
def out(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


@pytest.fixture
def folder(tmp_path) -> Path:
    write_task(tmp_path / "tasks", "rolling", ROLLING)
    return write_task(tmp_path / "tasks", "choice", documents=DOCUMENTS * 3)


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """Names of the runtimes that were opened."""
    names: list[str] = []
    true = evaluation.open_runtime

    def count(name, path, **options):
        names.append(name)
        return true(name, path, **options)

    monkeypatch.setattr(evaluation, "open_runtime", count)
    return names


def evaluate(path: Path, folder: Path, *arguments: object) -> dict:
    result = type_in("eval", path, "--include", folder, "--json", "--quiet", *arguments)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    found: dict = json.loads(result.stdout)
    return found


def test_all_artifacts_and_their_original_are_evaluated_and_compared(out, folder):
    found = evaluate(out, folder, "--tasks", "choice,rolling")
    assert found == json.loads((out / "evaluation.json").read_text())
    models = {model["name"]: model for model in found["models"]}
    assert {name: model["runtime"]["name"] for name, model in models.items()} == {
        "original": "torch",
        "gguf-f16": "llama.cpp",
        "gguf-q3": "llama.cpp",
    }
    bits = {name: model["tasks"]["rolling"]["metrics"]["bits_per_byte"]["value"] for name, model in models.items()}
    assert bits["gguf-f16"] == pytest.approx(bits["original"], rel=2e-3)
    assert bits["gguf-q3"] != pytest.approx(bits["original"], rel=2e-3)
    for name in ("gguf-f16", "gguf-q3"):
        answers = [
            json.loads((out / "eval" / each / "choice" / "result.json").read_text())["tasks"]["choice"]["metrics"]
            for each in ("original", name)
        ]
        before, after = (metrics["acc"]["answers"] for metrics in answers)
        (said,) = (each for each in found["differences"] if (each["model"], each["metric"]) == (name, "acc"))
        assert said["documents"] == len(before) == 36
        assert said["lost"] == sum(b > a for b, a in zip(before, after, strict=True))
        assert said["gained"] == sum(b < a for b, a in zip(before, after, strict=True))
        assert said["difference"]["value"] == pytest.approx((sum(after) - sum(before)) / 36)
        assert said["artifact"] == models[name]["tasks"]["choice"]["metrics"]["acc"]["value"]


def test_the_table_has_every_figure(out, folder):
    result = type_in("eval", out, "--include", folder, "--tasks", "choice,rolling", "--quiet")
    assert result.exit_code == 0, result.output
    found = json.loads((out / "evaluation.json").read_text())
    assert "choice  36 documents, 0-shot" in result.stdout
    for model in found["models"]:
        assert model["name"] in result.stdout
        for task in model["tasks"].values():
            for figures in task["metrics"].values():
                assert number(figures["value"]) in result.stdout
    for each in found["differences"]:
        assert f"{each['difference']['value']:+.3f} ({each['difference']['low']:+.3f}" in result.stdout


def test_what_was_evaluated_is_not_run_again(out, folder, opened):
    first = evaluate(out, folder, "--tasks", "choice")
    assert opened == ["torch", "llama.cpp", "llama.cpp"]
    assert evaluate(out, folder, "--tasks", "choice") == first
    assert len(opened) == 3
    evaluate(out, folder, "--tasks", "choice,rolling")
    assert len(opened) == 6
    (out / "eval" / "gguf-q3" / "choice" / "result.json").write_text("{}")
    assert evaluate(out, folder, "--tasks", "choice") == first
    assert len(opened) == 7
    write_task(folder, "choice", PIQA.replace("Answer:", "A:"), DOCUMENTS * 3)
    evaluate(out, folder, "--tasks", "choice")
    assert len(opened) == 10


def test_the_output_folder_stays_as_it_was_and_whole(out, folder):
    before = json.loads((out / "manifest.json").read_text())
    evaluate(out, folder, "--tasks", "choice", "--limit", 4)
    after = json.loads((out / "manifest.json").read_text())
    assert {**after, "files": None} == {**before, "files": None}
    assert before["files"].items() <= after["files"].items()
    assert {"evaluation.json", "eval/gguf-f16/choice/result.json"} < set(after["files"])
    assert type_in("verify", out).exit_code == 0


def test_one_artifact_is_evaluated_alone_or_against_any_model(out, folder, pico_llama, pico_qwen2, tmp_path):
    (file,) = (out / "gguf-f16").glob("*.gguf")
    alone = evaluate(file, folder, "--tasks", "choice", "--limit", 8)
    assert [model["name"] for model in alone["models"]] == [file.stem]
    assert alone["differences"] == []
    assert (tmp_path / f"{file.stem}-eval" / "evaluation.json").is_file()
    compared = evaluate(
        file, folder, "--tasks", "choice", "--limit", 8, "--against", pico_llama, "--out", tmp_path / "c"
    )
    assert compared["models"][1]["tasks"] == alone["models"][0]["tasks"]
    assert [(each["lost"], each["gained"]) for each in compared["differences"]] == [(0, 0), (0, 0)]
    other = evaluate(out, folder, "--tasks", "rolling", "--limit", 8, "--against", pico_qwen2)
    values = {m["name"]: m["tasks"]["rolling"]["metrics"]["bits_per_byte"]["value"] for m in other["models"]}
    assert abs(values["original"] - values["gguf-f16"]) > 0.01
    without = evaluate(out, folder, "--tasks", "choice", "--limit", 8, "--against", "none")
    assert [model["name"] for model in without["models"]] == ["gguf-f16", "gguf-q3"]


def test_shots_are_the_same_for_all(out, folder):
    found = evaluate(out, folder, "--tasks", "choice", "--limit", 4, "--shots", 3)
    assert [model["tasks"]["choice"]["shots"] for model in found["models"]] == [3, 3, 3]
