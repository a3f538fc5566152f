"""Questions, asked by the command, on a pico model that knows nothing."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from command import type_in
from mmlu_data import write_mmlu
from transformers import AutoModelForCausalLM

from mka_export.models.tokenizer import load_tokenizer, text_ids
from mka_export.parity.mmlu.prompts import make_sheet
from mka_export.parity.mmlu.questions import load_subjects, sample
from mka_export.parity.runtimes.torch_runtime import TorchRuntime
from mka_export.pipeline import measuring

SMALL = ["--windows", "6", "--window-tokens", "64", "--calibration-tokens", "1024", "--device", "cpu", "--quiet"]
ASKED = ["--mmlu-questions", "24", "--mmlu-shots", "1", "--mmlu-seed", "3"]


@pytest.fixture(scope="module")
def model(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(pico_llama, tmp_path_factory.mktemp("asked") / "pico"))


@pytest.fixture(scope="module")
def questions(model: Path) -> Path:
    return write_mmlu(model.parent / "mmlu")


@pytest.fixture(scope="module")
def done(model: Path, questions: Path) -> tuple[Path, Result]:
    out = model.parent / "out"
    made = type_in(
        model, "--ratio", "0.3", "--protect", "1", "--to", "gguf-f16", "--mmlu", questions, *ASKED, "--out", out, *SMALL
    )
    return out, made


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


@torch.no_grad()
def answers(asked: torch.nn.Module, folder: Path, source: str) -> tuple[list[int], float]:
    """Return what a model of transformers answers, a question at a time, and the share that is right."""
    tokenize = partial(text_ids, load_tokenizer(folder))
    sheet = make_sheet(sample(load_subjects(source), 24, 3), 1, tokenize, [], 512)
    logits = (asked(torch.tensor([prompt.ids])).logits[0, -1, list(sheet.letters)] for prompt in sheet.prompts)
    chosen = [int(each.argmax()) for each in logits]
    return chosen, float(np.mean([c == p.answer for c, p in zip(chosen, sheet.prompts, strict=True)]))


def test_the_answers_are_those_of_transformers(done: tuple[Path, Result], model: Path) -> None:
    out, result = done
    assert result.exit_code in (0, 3, 4), result.output
    (target,) = report(out)["targets"]
    about = report(out)["mmlu"]
    assert (about["questions"], about["subjects"], about["shots"], about["seed"]) == (24, 3, 1, 3)
    assert [step["name"] for step in target["mmlu"]["steps"]] == ["original", "merged", "artifact"]
    assert [step["runtime"] for step in target["mmlu"]["steps"]] == ["torch", "torch", "llama.cpp"]
    for step, folder in zip(target["mmlu"]["steps"], (model, out / "merged"), strict=False):
        asked = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        chosen, right = answers(asked, folder, about["source"])
        assert list(step["letters"].values()) == [chosen.count(i) for i in range(4)]
        assert step["accuracy"]["value"] == pytest.approx(right)


def test_conversion_and_compression_are_told_apart(done: tuple[Path, Result]) -> None:
    out, result = done
    (target,) = report(out)["targets"]
    assert {kind: c["against"] for kind, c in target["mmlu"]["comparisons"].items()} == {
        "conversion": "merged",
        "compression": "original",
    }
    assert target["mmlu"]["comparisons"]["conversion"]["same_answer"] > 0.9
    assert [group["name"] for group in target["mmlu"]["subjects"]] == [
        "abstract_algebra",
        "virology",
        "world_religions",
    ]
    assert [entry["metric"] for entry in target["attribution"]] == ["ln_ppl", "mmlu"]
    assert "no better than chance" in result.stdout
    assert "MMLU, paired" in result.stdout
    metrics = [check["metric"] for c in target["comparisons"].values() for check in c["checks"]]
    assert "mmlu_drop" not in metrics  # a model that guesses decides nothing


def test_asking_again_costs_nothing_and_another_question_costs_only_the_questions(
    done: tuple[Path, Result], model: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = done
    worked: list[str] = []

    def counted(name: str, *arguments: Any, **options: Any) -> Any:
        worked.append(name)
        return open_runtime(name, *arguments, **options)

    def counted_asking(runtime: TorchRuntime, *arguments: Any) -> Any:
        worked.append("torch, asked")
        return ask(runtime, *arguments)

    def counted_run(runtime: TorchRuntime, *arguments: Any) -> Any:
        worked.append("torch, on windows")
        return run(runtime, *arguments)

    open_runtime, ask, run = measuring.open_runtime, TorchRuntime.next_log_probs, TorchRuntime.run
    monkeypatch.setattr(measuring, "open_runtime", counted)
    monkeypatch.setattr(TorchRuntime, "next_log_probs", counted_asking)
    monkeypatch.setattr(TorchRuntime, "run", counted_run)
    command = [model, "--ratio", "0.3", "--protect", "1", "--to", "gguf-f16", "--mmlu", questions, "--out", out, *SMALL]
    before = report(out)
    assert type_in(*command, *ASKED, "--max-mmlu-drop", "0.5").exit_code in (0, 3, 4)
    assert worked == []
    assert report(out)["targets"][0]["mmlu"]["steps"] == before["targets"][0]["mmlu"]["steps"]
    assert type_in(*command, *ASKED[:-1], "4").exit_code in (0, 3, 4)
    assert sorted(worked) == ["llama.cpp", "torch, asked", "torch, asked"]  # the windows are not measured again


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mmlu", "nowhere"], "--mmlu nowhere is no folder"),
        (["--mmlu-questions", "31"], "--mmlu-questions 31: there are 30"),
        (["--mmlu-shots", "6"], "6 is not in the range 0<=x<=5"),
        (["--max-mmlu-drop", "2"], "2.0 is not in the range 0<=x<=1"),
    ],
)
def test_what_cannot_be_asked_is_said_before_any_work(
    options: list[str], message: str, model: Path, questions: Path, tmp_path: Path
) -> None:
    result = type_in("convert", model, "--to", "gguf-f16", "--mmlu", questions, *options, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_methods_are_compared_by_it_too(model: Path, questions: Path, tmp_path: Path) -> None:
    chosen = ["--methods", "mka,tail", "--ratios", "0.33", "--protect", "1"]
    result = type_in("compare", model, *chosen, "--mmlu", questions, *ASKED, "--out", tmp_path / "out", *SMALL)
    assert result.exit_code == 0, result.output
    assert "Asked       24 questions of MMLU, 1-shot" in result.stdout
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    assert found["original"]["mmlu"]["accuracy"]["value"] == answers(whole, model, str(questions))[1]
    whole.model.layers = whole.model.layers[:4]  # what tail leaves of six
    tail = next(row["mmlu"] for row in found["results"] if row["name"] == "tail")
    assert tail["accuracy"]["value"] == answers(whole, model, str(questions))[1]
    for row in found["results"]:
        change = row["mmlu"]["accuracy"]["value"] - found["original"]["mmlu"]["accuracy"]["value"]
        assert row["mmlu"]["change"]["value"] == pytest.approx(change)
        assert row["mmlu"]["change"]["low"] < change < row["mmlu"]["change"]["high"]
    assert "right answers to MMLU" in (tmp_path / "out" / "comparison.svg").read_text()


def test_shards_together_say_what_one_check_says(
    done: tuple[Path, Result], model: Path, questions: Path, tmp_path: Path
) -> None:
    (artifact,) = (done[0] / "gguf-f16").glob("*.gguf")
    command = ["check", artifact, "--against", model, "--mmlu", questions, *ASKED, *SMALL]
    assert type_in(*command, "--out", tmp_path / "whole").exit_code in (0, 3, 4)
    shards = [tmp_path / f"shard-{i}" for i in (1, 2)]
    for i, out in enumerate(shards, 1):
        assert type_in(*command, "--shard", f"{i}/2", "--out", out).exit_code in (0, 3, 4)
    joined = tmp_path / "joined"
    result = type_in("report", "--merge", *reversed(shards), "--out", joined, "--quiet")
    assert result.exit_code in (0, 3, 4), result.output
    for out in (joined, tmp_path / "whole"):  # and read back from its stages
        assert type_in("report", out, "--quiet").exit_code in (0, 3, 4)
    expected, found = report(tmp_path / "whole"), report(joined)
    assert [sum(s["questions"] for s in report(out)["targets"][0]["mmlu"]["subjects"]) for out in shards] == [16, 8]
    assert found["mmlu"] == expected["mmlu"]
    for key in ("mmlu", "attribution", "comparisons", "verdict", "warnings"):
        assert found["targets"][0][key] == expected["targets"][0][key], key
    assert type_in("verify", joined).exit_code == 0
    assert type_in(*command, "--shard", "1/4", "--out", tmp_path / "none").exit_code == 2  # there are three subjects
