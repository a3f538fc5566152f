"""Real models answer MMLU in every runtime as in torch; and a model that only guesses is told from one that knows."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import type_in

from mka_export.pipeline.asking import read_asked

pytestmark = pytest.mark.real
SUBJECTS = ("marketing", "sociology", "us_foreign_policy")
ASKED = ["--windows", "5", "--window-tokens", "64", "--quiet"]


@pytest.fixture(scope="module")
def questions(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MMLU with three subjects: of so few questions the examples of 57 would be nearly all that is computed."""
    folder = tmp_path_factory.mktemp("mmlu")
    for split in ("dev", "test"):
        (folder / split).mkdir()
        for name in SUBJECTS:
            shutil.copy(shared_data / "mmlu" / split / f"{name}_{split}.csv", folder / split)
    return folder


@pytest.fixture(scope="module")
def done(real_qwen: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("qwen") / "out"
    command = ["convert", real_qwen, "--to", "gguf-f16", "--to", "onnx-fp32", "--mmlu", questions, *ASKED]
    command += ["--mmlu-questions", "57", "--out", out]
    result = type_in(*command)
    assert result.exit_code in (0, 4), result.output  # so few questions may leave it open
    return out


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


@pytest.mark.parametrize("target", ["gguf-f16", "onnx-fp32"])
def test_every_runtime_answers_as_torch_does(target: str, done: Path) -> None:
    asked = read_asked(done, ["original", "artifact"], target)
    torch, artifact = asked.answers
    same, rows = torch.chosen == artifact.chosen, np.arange(57)
    others = np.where(np.eye(4, dtype=bool)[torch.chosen], -np.inf, torch.letters)
    margin, kept = (
        each.letters[rows, torch.chosen] - each.letters[rows, others.argmax(axis=1)] for each in (torch, artifact)
    )
    assert same.sum() >= 56
    assert (margin[~same] <= np.abs(kept - margin)[same].max()).all(), "a difference that is no rounding"


def test_five_examples_tell_what_it_knows(done: Path) -> None:
    (step, *_) = report(done)["targets"][0]["mmlu"]["steps"]
    assert not step["at_chance"]
    checks = {c["metric"]: c for c in report(done)["targets"][0]["comparisons"]["compression"]["checks"]}
    assert checks["mmlu_drop"]["verdict"] in ("pass", "inconclusive")  # of 57 questions


def test_without_examples_it_guesses_which_is_said(
    real_qwen: Path, questions: Path, done: Path, tmp_path: Path
) -> None:
    (artifact,) = (done / "gguf-f16").glob("*.gguf")
    command = ["check", artifact, "--against", real_qwen, "--mmlu", questions, "--mmlu-shots", "0", *ASKED]
    command += ["--mmlu-questions", "30", "--out", tmp_path / "out"]
    result = type_in(*command)
    assert result.exit_code in (0, 4), result.output
    (target,) = report(tmp_path / "out")["targets"]
    warnings = " ".join(target["warnings"])
    assert re.search(r"The original model answers [ABCD] to \d+ % of MMLU's questions", warnings)
    assert "mmlu_drop" in {c["metric"] for c in target["comparisons"]["compression"]["checks"]} or (
        "no better than chance" in warnings
    )
