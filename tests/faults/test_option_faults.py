"""Options"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command import type_in
from fault_tools import MERGE, SMALL, contents

TO = ["--to", "gguf-q4"]
CASES: dict[str, tuple[list[str], str]] = {
    "the ratio is 0": (["{model}", "--ratio", "0", *TO], "between 0 and 1"),
    "the ratio is 1": (["{model}", "--ratio", "1", *TO], "between 0 and 1"),
    "the ratio is negative": (["{model}", "--ratio", "-0.1", *TO], "between 0 and 1"),
    "the ratio is NaN": (["{model}", "--ratio", "nan", *TO], "between 0 and 1"),
    "the ratio is no number": (["{model}", "--ratio", "half", *TO], "'half' is neither a number nor auto"),
    "a limit decides how many layers go, and nothing is made": (
        ["merge", "{model}", "--ratio", "auto"],
        "needs a target",
    ),
    "a limit decides how many layers go, and healing comes after": (
        ["{model}", "--ratio", "auto", "--heal", "distill", *TO],
        "before it is healed",
    ),
    "a size beside a ratio": (["{model}", *MERGE, *TO, "--max-size", "1GB"], "--max-size goes with --ratio auto"),
    "a size in no known unit": (["{model}", "--ratio", "auto", *TO, "--max-size", "1TB"], "'1TB' is no size"),
    "a size of 400 digits": (["{model}", "--ratio", "auto", *TO, "--max-size", "9" * 400], "is no size"),
    "a size that nothing fits into": (
        ["{model}", "--ratio", "auto", *TO, "--max-size", "1KB"],
        "gguf-q4 may take 1.3 MB",
    ),
    "a limit is NaN": (["{model}", *MERGE, *TO, "--max-ppl-ratio", "nan"], "'nan' is no finite number"),
    "a limit is infinite": (["{model}", *MERGE, *TO, "--max-mean-kl", "inf"], "'inf' is no finite number"),
    "the ratio reaches the protected layers": (["{model}", "--ratio", "0.9", *TO], "at most 1 can go"),
    "more layers are protected than there are": (["{model}", *MERGE[:2], "--protect", "6", *TO], "has 6 layers"),
    "there is no ratio": (["{model}", *TO], "give either --ratio or --plan"),
    "there is no target": (["{model}", *MERGE], "no --to"),
    "the target is unknown": (["{model}", *MERGE, "--to", "gguf-q44"], "did you mean gguf-q4?"),
    "a target is named twice": (["{model}", *MERGE, *TO, *TO], "twice"),
    "the target is for other families": (["{model}", *MERGE, "--to", "{alien_target}"], "is for mamba, not llama"),
    "the target's file misnames a field": (["{model}", *MERGE, "--to", "{bad_target}"], "precison"),
    "the target's runtime is unknown": (["{model}", *MERGE, "--to", "{odd_target}"], "did you mean llama.cpp?"),
    "the method is unknown": (["{model}", *MERGE, *TO, "--method", "mka-papr"], "did you mean mka-paper?"),
    "the measure is unknown": (["{model}", *MERGE, *TO, "--measure", "cosin"], "did you mean cosine?"),
    "the measure of a picture is unknown": (["similarity", "{model}", "--measure", "npid"], "did you mean npib?"),
    "a measure is given to a method that has its own": (
        ["{model}", *MERGE, *TO, "--method", "tail", "--measure", "cka"],
        "tail has its own way to choose",
    ),
    "an option is unknown": (["{model}", *MERGE, *TO, "--rato", "3"], "--rato"),
    "an average's weight is given to a method that does not average": (
        ["{model}", *MERGE, *TO, "--alpha", "0.5"],
        "--alpha is for --method mka-paper",
    ),
    "both a ratio and a plan are given": (["{model}", *MERGE, "--plan", "{plan}", *TO], "either --ratio or --plan"),
    "the plan is none": (["{model}", "--plan", "{model}/config.json", *TO], "not a merge plan"),
    "the plan is for another model": (["{model}", "--plan", "{alien_plan}", *TO], "llama with 40 layers"),
    "the device is unknown": (["{model}", *MERGE, *TO, "--device", "tpu"], "unknown --device"),
    "the device is not there": (["{model}", *MERGE, *TO, "--device", "cuda"], "CUDA"),
    "the short name is unknown": (["llama3-8bb", *MERGE, *TO], "did you mean llama3-8b?"),
    "the output is the model": (["{model}", *MERGE, *TO, "--out", "{model}"], "never written to"),
    "the output is inside the model": (["{model}", *MERGE, *TO, "--out", "{model}/out"], "inside the model"),
    "what is checked is no artifact": (["check", "{plan}", "--against", "{model}"], "no .gguf file and no ONNX folder"),
}


@pytest.mark.parametrize("fault", CASES)
def test_refused(fault, model, published, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = json.loads((published / "merged" / "plan.json").read_text())
    names = {"model": model, "plan": published / "merged" / "plan.json"}
    for name in ("alien_plan", "alien_target", "bad_target", "odd_target"):
        names[name] = tmp_path / f"{name}.{'toml' if 'target' in name else 'json'}"
    names["alien_plan"].write_text(json.dumps({**plan, "model": {**plan["model"], "layers": 40}, "layers": []}))
    target = 'description = "x"\nconverter = "gguf"\nprecision = "q8_0"\nruntime = "llama.cpp"\n'
    names["alien_target"].write_text(target + 'families = ["mamba"]\n')
    names["odd_target"].write_text(target.replace("llama.cpp", "llamacpp"))
    names["bad_target"].write_text(target.replace("precision", "precison"))
    before = {name: path.read_bytes() for name, path in names.items() if path.is_file()}, contents(model)
    arguments, words = CASES[fault]
    refused([a.format(**names) for a in arguments], words, code=2)
    assert ({name: path.read_bytes() for name, path in names.items() if path.is_file()}, contents(model)) == before
    assert not [p for p in tmp_path.rglob("*.gguf") if "earlier" not in p.parts]


def test_refused_files_of_others(model, tmp_path):
    """the output folder holds someone else's files"""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    result = type_in(model, *MERGE, *TO, "--out", tmp_path / "mine", *SMALL)
    assert result.exit_code == 1
    assert "thesis.txt" in result.stderr
    assert contents(tmp_path / "mine") == {"thesis.txt": b"years of work"}


def test_refused_manifest_of_others(model, tmp_path):
    """the output folder holds another program's manifest.json"""
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "manifest.json").write_text('{"name": "an app"}')
    result = type_in(model, *MERGE, *TO, "--out", tmp_path / "app", *SMALL)
    assert result.exit_code == 1
    assert contents(tmp_path / "app") == {"manifest.json": b'{"name": "an app"}'}


@pytest.mark.parametrize("place", ["merged", "gguf-q8"])
def test_refused_result_in_place_of_the_model(place, published, tmp_path):
    """the result would take the place of the model"""
    out = Path(shutil.copytree(published, tmp_path / "out"))
    before = contents(out)
    model = out / "merged" if place == "merged" else next((out / place).glob("*.gguf"))
    result = type_in(model, *MERGE, "--to", "gguf-q8", "--out", out, *SMALL, "--quiet")
    assert result.exit_code == 2
    assert f"{out / place} would be replaced, and holds the model {model}" in result.stderr
    assert contents(out) == before


def test_refused_picture_in_place_of_the_model(published, tmp_path):
    """the similarity of the layers would take the place of the model"""
    out = Path(shutil.copytree(published, tmp_path / "out"))
    model = (out / "merged").rename(out / "similarity")
    before = contents(out)
    result = type_in("similarity", model, "--out", out, *SMALL, "--quiet")
    assert result.exit_code == 2
    assert f"{model} would be replaced, and holds the model {model}" in result.stderr
    assert contents(out) == before


def test_refused_pickle_folder(model, tmp_path, refused):
    """the model is a folder without a model"""
    folder = Path(shutil.copytree(model, tmp_path / "empty"))
    (folder / "config.json").unlink()
    refused([folder, *MERGE, *TO, "--out", "{out}", *SMALL], "config.json", code=2)
