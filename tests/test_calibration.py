"""Where calibration text is from: sampled from the model, or a dataset of the hub (a local folder stands in for it)."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from command import type_in
from transformers import AutoModelForCausalLM

from mka_export.errors import SourceError, UsageError
from mka_export.models.dataset import dataset_text
from mka_export.models.sampling import sample_windows
from mka_export.models.text import load_text
from mka_export.progress import Progress

SMALL = ["--windows", "6", "--window-tokens", "64", "--calibration-tokens", "1024", "--device", "cpu", "--quiet"]
MERGE = ["--ratio", "0.3", "--protect", "1"]
QUIET = Progress(quiet=True)


def test_sampled_text_follows_the_models_probabilities(pico_llama):
    sample = partial(sample_windows, pico_llama, 1, range(10, 60), 40, 48, torch.device("cpu"), QUIET)
    ids = sample()
    assert ids.shape == (40, 48)
    assert (ids[:, 0] == 1).all()
    assert set(ids[:, 1].tolist()) <= set(range(10, 60))
    assert len(set(ids[:, 1].tolist())) > 20
    model = AutoModelForCausalLM.from_pretrained(pico_llama, dtype=torch.float32)
    with torch.no_grad():
        log_probs = model(ids).logits[:, 1:-1].double().log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    loss = -log_probs.gather(-1, ids[:, 2:, None])[..., 0]
    variance = (log_probs.exp() * log_probs.square()).sum(-1) - entropy.square()
    # The mean surprise of what was sampled is the mean entropy, up to its standard error.
    assert abs(float((loss - entropy).sum())) < 4 * float(variance.sum().sqrt())
    assert torch.equal(ids, sample())


def test_no_data_is_needed_where_the_model_makes_its_own(pico_llama, tmp_path):
    result = type_in("merge", pico_llama, *MERGE, "--calibration", "self", "--out", tmp_path / "out", *SMALL)
    assert result.exit_code == 0, result.output
    plan = json.loads((tmp_path / "out" / "merged" / "plan.json").read_text())
    assert plan["calibration"]["source"] == "self"
    ids = np.load(tmp_path / "out" / "sampled" / "ids.npy")
    assert ids.shape == (2, 512)
    assert plan["calibration"]["tokens"] == 1024
    before = (tmp_path / "out" / "sampled" / "stage.json").stat().st_mtime_ns
    assert (
        type_in("merge", pico_llama, *MERGE, "--calibration", "self", "--out", tmp_path / "out", *SMALL).exit_code == 0
    )
    assert (tmp_path / "out" / "sampled" / "stage.json").stat().st_mtime_ns == before


def test_sampling_is_forecast(pico_llama, tmp_path):
    job = [pico_llama, *MERGE, "--to", "gguf-q8", "--out", tmp_path / "out", *SMALL, "--dry-run", "--json"]
    plain = json.loads(type_in(*job).stdout)["stages"]
    found = json.loads(type_in(*job, "--calibration", "self").stdout)["stages"]
    assert set(found) - set(plain) == {"sampled"}
    assert found["sampled"]["memory"] > 4 * 10**5


def test_sampling_is_refused_where_memory_is_short(pico_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("mka_export.pipeline.job.free_memory", lambda: 10**8)
    result = type_in("merge", pico_llama, *MERGE, "--calibration", "self", "--out", tmp_path / "out", *SMALL)
    assert result.exit_code == 1
    assert "sampling text holds the whole model, and needs" in result.stderr
    assert "100.0 MB are free" in result.stderr


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A folder that stands in for the dataset ``someone/texts`` on the hub."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    load = datasets.load_dataset

    def fake(name, config=None, *, split, streaming):
        assert (name, streaming) == ("someone/texts", True)
        return load(str(folder), config, split=split, streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    return folder


def write_rows(folder: Path, rows: list[dict], split: str = "train") -> None:
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_merge_calibrates_on_a_dataset_of_the_hub(hub, pico_llama, tmp_path):
    text = load_text("calibration", None).text
    write_rows(hub, [{"id": i, "text": line} for i, line in enumerate(text.splitlines())], "validation")
    spec = "hub:someone/texts::validation"
    result = type_in("merge", pico_llama, *MERGE, "--calibration", spec, "--out", tmp_path / "out", *SMALL)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "merged" / "plan.json").read_text())["calibration"]["source"] == spec


def test_no_more_rows_are_read_than_needed(hub):
    write_rows(hub, [{"text": f"line {i:04}"} for i in range(1000)])
    text = dataset_text("hub:someone/texts", 95)
    assert text.text == "\n".join(f"line {i:04}" for i in range(10))
    assert text.source == "hub:someone/texts"


def test_the_only_column_of_strings_is_the_text(hub):
    write_rows(hub, [{"number": 1, "body": "one"}, {"number": 2, "body": "two"}])
    assert dataset_text("hub:someone/texts", 100).text == "one\ntwo"
    write_rows(hub, [{"question": "one", "answer": "two"}])
    with pytest.raises(UsageError, match=r"its columns are question, answer; none is called text"):
        dataset_text("hub:someone/texts", 100)


def test_a_dataset_that_holds_the_evaluation_text_is_refused(hub, pico_llama, tmp_path):
    write_rows(hub, [{"text": load_text("evaluation", None).text}])
    result = type_in("merge", pico_llama, *MERGE, "--calibration", "hub:someone/texts", "--out", tmp_path / "o", *SMALL)
    assert result.exit_code == 2
    assert "share" in result.stderr


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("hub:", UsageError, "a dataset is written hub:NAME"),
        ("hub:a:b:c:d", UsageError, "a dataset is written hub:NAME"),
        ("hub:someone/texts::tset", SourceError, "cannot read the dataset hub:someone/texts::tset"),
    ],
)
def test_what_is_no_dataset_is_one_line(spec, error, message, hub):
    write_rows(hub, [{"text": "one"}])
    with pytest.raises(error, match=message):
        dataset_text(spec, 100)


def test_without_the_package_the_remedy_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"pip install 'mka-export\[datasets\]'"):
        dataset_text("hub:someone/texts", 100)


def test_out_of_reach_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="cannot read the dataset hub:someone/texts-that-are-not"):
        dataset_text("hub:someone/texts-that-are-not", 100)
