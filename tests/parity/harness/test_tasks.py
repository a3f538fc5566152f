"""Tasks of the harness: what they give, what their fingerprint tells apart, and how they fail."""

from __future__ import annotations

import pytest
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from local_tasks import DOCUMENTS, LETTERS, PIQA, ROLLING, WRITTEN, write_task

from mka_export.errors import MkaError
from mka_export.parity.harness.frame import Frame
from mka_export.parity.harness.model import RuntimeLM
from mka_export.parity.harness.tasks import Tasks
from mka_export.parity.runtimes import open_runtime
from mka_export.progress import Progress


def tasks(names, folder, shots=None, limit=None):
    return Tasks(names, folder, shots, limit, quiet=True)


def fingerprint(folder, name="mine", shots=None, limit=None):
    return tasks([name], folder, shots, limit).load(name).sha256


@pytest.fixture(scope="module")
def model(pico_llama, tmp_path_factory):
    runtime = open_runtime("torch", pico_llama)
    yield RuntimeLM(runtime, Frame.of(pico_llama), tmp_path_factory.mktemp("pieces"), Progress(quiet=True))
    runtime.close()


@pytest.mark.parametrize("shots", [None, 2])
def test_results_are_those_of_the_harness_on_transformers(model, pico_llama, tmp_path, shots):
    kinds = {"choice": PIQA, "letters": LETTERS, "rolling": ROLLING, "written": WRITTEN}
    for name, kind in kinds.items():
        folder = write_task(tmp_path / "tasks", name, kind)
    theirs = simple_evaluate(
        HFLM(pretrained=str(pico_llama), dtype="float32", device="cpu"),
        tasks=[*kinds],
        num_fewshot=shots,
        limit=8,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )
    ours = tasks(kinds, folder, shots, 8)
    for name in kinds:
        found = ours.run(ours.load(name), model)["tasks"][name]
        assert (found["shots"], len(found["documents"])) == (shots or 0, 8)
        for metric, figures in found["metrics"].items():
            assert figures["value"] == pytest.approx(theirs["results"][name][f"{metric},none"], rel=1e-3)
        assert found["documents"] == [each["doc_hash"] for each in theirs["samples"][name]]
        if name != "rolling":
            metric = next(iter(found["metrics"]))
            assert found["metrics"][metric]["answers"] == [each[metric] for each in theirs["samples"][name]]


def test_a_group_has_its_tasks_and_their_mean(model, tmp_path):
    folder = write_task(tmp_path / "tasks", "first")
    write_task(folder, "second", documents=DOCUMENTS[:4])
    (folder / "both.yaml").write_text(
        "group: both\ntask: [first, second]\naggregate_metric_list:\n  - metric: acc\n    weight_by_size: true\n"
    )
    ours = tasks(["both"], folder)
    found = ours.run(ours.load("both"), model)
    assert set(found["tasks"]) == {"first", "second"}
    answers = [answer for task in found["tasks"].values() for answer in task["metrics"]["acc"]["answers"]]
    assert len(answers) == 16
    assert found["groups"]["both"]["acc"]["value"] == pytest.approx(sum(answers) / 16)


def test_fingerprint_tells_apart_whatever_changes_a_result(tmp_path):
    folder = write_task(tmp_path / "tasks", "mine")
    first = fingerprint(folder)
    assert fingerprint(folder) == first
    assert len({first, fingerprint(folder, shots=2), fingerprint(folder, limit=3)}) == 3
    write_task(folder, "mine", documents=[*DOCUMENTS[:11], {**DOCUMENTS[11], "sol1": "23"}])
    assert fingerprint(folder) != first
    assert fingerprint(folder, limit=3) == fingerprint(write_task(folder, "mine"), limit=3)
    write_task(folder, "mine", PIQA.replace("Answer:", "A:"))
    assert fingerprint(folder) != first


def test_a_task_that_says_0_shots_stays_there(tmp_path):
    folder = write_task(tmp_path / "tasks", "mine", more="num_fewshot: 0\n")
    assert fingerprint(folder, shots=3) == fingerprint(folder)


def test_functions_that_a_task_file_names_are_run(model, tmp_path):
    folder = write_task(tmp_path / "tasks", "mine", PIQA.replace('"Question: {{goal}}\\nAnswer:"', "!function own.ask"))
    (folder / "own.py").write_text("def ask(doc):\n    return doc['goal'] + '\\nAnswer:'\n")
    ours = tasks(["mine"], folder)
    loaded = ours.load("mine")
    assert len(ours.run(loaded, model)["tasks"]["mine"]["documents"]) == 12
    (folder / "own.py").write_text("def ask(doc):\n    return doc['goal'] + '\\nAnswer: '\n")
    assert fingerprint(folder) != loaded.sha256


def test_what_a_task_raises_is_a_line(model, tmp_path):
    folder = write_task(
        tmp_path / "tasks", "mine", PIQA.replace("doc_to_target: label", "doc_to_target: !function own.no")
    )
    (folder / "own.py").write_text("def no(doc):\n    return 0 if doc['goal'].endswith('0 plus 0?') else 1 / 0\n")
    ours = tasks(["mine"], folder)
    with pytest.raises(MkaError, match=r"lm-evaluation-harness: task mine: ZeroDivisionError: division by zero"):
        ours.run(ours.load("mine"), model)
