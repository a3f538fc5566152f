"""SmolLM2 in the harness: our GGUF in llama.cpp, against the harness's own backend on the checkpoint it was made from."""

from __future__ import annotations

import json

import pytest
from command import type_in
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from local_tasks import LETTERS, PIQA, ROLLING, write_task

from mka_export.models.sources import cache_folder, fetch, resolve
from mka_export.parity.harness.frame import Frame
from mka_export.parity.harness.model import RuntimeLM
from mka_export.parity.runtimes import open_runtime
from mka_export.progress import Progress

pytestmark = pytest.mark.real
DOCUMENTS = [
    {"goal": goal, "sol1": good, "sol2": bad, "label": 0}
    for goal, good, bad in (
        ("How do I keep bread fresh?", "Put it into a closed box, and eat it soon.", "Put it into a bucket of water."),
        ("How do I boil an egg?", "Lay it into boiling water for some minutes.", "Lay it into the freezer at night."),
        ("What do plants need?", "Light, water, and air.", "A newspaper every morning, with coffee."),
        ("How do I cross a street?", "Look both ways, then walk.", "Close your eyes, then run."),
        ("What is the capital of France?", "Paris", "A small town in the north of Norway"),
        ("How do I open a window?", "Turn the handle and pull.", "Shout at it until the glass melts."),
    )
]


def test_log_likelihoods_and_answers_are_those_of_transformers(real_smollm2, tmp_path):
    out = tmp_path / "out"
    small = ["--windows", "2", "--window-tokens", "16", "--quiet"]
    type_in("convert", real_smollm2, "--to", "gguf-f16", "--out", out, *small)
    (file,) = (out / "gguf-f16").glob("*.gguf")
    checkpoint = fetch(resolve(str(real_smollm2)), cache_folder(), Progress(quiet=True)).path
    kinds = {"choice": PIQA, "letters": LETTERS, "rolling": ROLLING}
    for name, kind in kinds.items():
        folder = write_task(tmp_path / "tasks", name, kind, DOCUMENTS)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    runtime = open_runtime("llama.cpp", file)
    (tmp_path / "pieces").mkdir()
    ours = RuntimeLM(runtime, Frame.of(file), tmp_path / "pieces", Progress(quiet=True))
    theirs = HFLM(pretrained=str(checkpoint), dtype="float32", device="cpu")
    found, expected = (
        simple_evaluate(model, tasks=[*kinds], task_manager=manager)["samples"] for model in (ours, theirs)
    )
    runtime.close()
    for name in kinds:
        for here, there in zip(found[name], expected[name], strict=True):
            for ((mine, *greedy),), ((other, *so),) in zip(_answers(here), _answers(there), strict=True):
                assert mine == pytest.approx(other, abs=1e-2 * max(1, abs(other) / 10))
                assert greedy == so
    right = [sample["acc_norm"] for sample in found["choice"]]
    assert sum(right) >= 5, "it knows how to boil an egg"

    result = type_in("eval", out, "--tasks", "choice", "--include", folder, "--json", "--quiet")
    said = json.loads(result.stdout)
    values = {model["name"]: model["tasks"]["choice"]["metrics"]["acc_norm"]["value"] for model in said["models"]}
    assert values == {"original": pytest.approx(sum(right) / 6), "gguf-f16": pytest.approx(sum(right) / 6)}


def _answers(sample):
    return [[each if isinstance(each, tuple) else (each,) for each in answers] for answers in sample["resps"]]
