"""Evaluation"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command import type_in
from local_tasks import PIQA, WRITTEN, write_task

GREEDY = "max_gen_toks: 40\n"
CASES = {
    "no task is named": (",", 2, "--tasks names none"),
    "there is no such task": ("mine,piqa,hellaswag,race,boolqq", 2, "has no task 'boolqq'. Did you mean boolq?"),
    "a task's data is missing": ("lost", 1, "task lost: FileNotFoundError", "--include FOLDER"),
    "a task's data is damaged": ("damaged", 1, "task damaged: "),
    "a task's own function fails": ("raising", 1, "task raising: ZeroDivisionError"),
    "a task samples, and only greedy generation is done": ("sampling", 1, "the task samples"),
    "a task generates more than the model's context holds": ("long", 1, "up to 512 tokens", "context has 512"),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path) -> Path:
    write_task(tmp_path / "tasks", "mine")
    (write_task(tmp_path / "tasks", "lost") / "lost.jsonl").unlink()
    (write_task(tmp_path / "tasks", "damaged") / "damaged.jsonl").write_text('{"goal": "What')
    write_task(tmp_path / "tasks", "raising", PIQA.replace("doc_to_target: label", "doc_to_target: !function own.no"))
    (tmp_path / "tasks" / "own.py").write_text("def no(doc):\n    return 1 / 0\n")
    write_task(
        tmp_path / "tasks", "sampling", WRITTEN.replace(GREEDY, f"{GREEDY}  do_sample: true\n  temperature: 1.0\n")
    )
    return write_task(tmp_path / "tasks", "long", WRITTEN.replace(GREEDY, "max_gen_toks: 512\n"))


@pytest.mark.parametrize("fault", CASES)
def test_refused(fault, folder, refused):
    task, code, *words = CASES[fault]
    refused(["eval", "{out}", "--tasks", task, "--include", folder, "--quiet"], *words, code=code)


def test_refused_no_folder(tmp_path, refused):
    """the folder of task files is none"""
    refused(["eval", "{out}", "--tasks", "mine", "--include", tmp_path / "no"], "is no folder", code=2)


def test_refused_no_harness(folder, refused, monkeypatch):
    """lm-evaluation-harness is not installed"""
    monkeypatch.setattr("mka_export.parity.harness.find_spec", lambda name: None)
    refused(["eval", "{out}", "--tasks", "mine", "--include", folder], "pip install 'mka-export[eval]'", code=2)


@pytest.mark.parametrize("kind", ["a file of another kind", "a folder without an artifact", "nothing"])
def test_refused_no_artifact(kind, folder, tmp_path, refused):
    """what is evaluated is no artifact"""
    path = tmp_path / "thing"
    if kind != "nothing":
        path.write_text("text") if "file" in kind else path.mkdir()
    refused(
        ["eval", path, "--tasks", "mine", "--include", folder],
        "no .gguf file and no ONNX folder",
        code=2,
    )


def test_refused_original_gone(pico_llama, folder, tmp_path, published):
    """the model that an output folder was made from is no longer there"""
    model = Path(shutil.copytree(pico_llama, tmp_path / "model"))
    out = Path(shutil.copytree(published, tmp_path / "out"))
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "source": {"kind": "directory", "id": str(model)}}))
    shutil.rmtree(model)
    result = type_in("eval", out, "--tasks", "mine", "--include", folder, "--quiet")
    assert result.exit_code == 2
    assert f"{model} does not exist" in result.stderr


def test_survived_damaged_artifact(folder, tmp_path, published):
    """an artifact is damaged: that one fails, the original and the others are evaluated"""
    out = Path(shutil.copytree(published, tmp_path / "out"))
    shutil.copytree(out / "gguf-q8", out / "gguf-broken")
    (file,) = (out / "gguf-broken").glob("*.gguf")
    file.write_bytes(file.read_bytes()[:100_000])
    result = type_in("eval", out, "--tasks", "mine", "--include", folder, "--limit", 4, "--quiet", "--json")
    assert result.exit_code == 1
    found = {model["name"]: model for model in json.loads(result.stdout)["models"]}
    assert "gguf-broken" in found["gguf-broken"]["error"]
    assert found["gguf-broken"]["tasks"] == {}
    for name in ("original", "gguf-q8"):
        assert found[name]["error"] is None
        assert found[name]["tasks"]["mine"]["documents"] == 4
