"""The device asked for is the device computed on: what can be tested of it without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import masking_utils

from mka_export.errors import UsageError
from mka_export.models import runner as module
from mka_export.models.checkpoint import Checkpoint
from mka_export.models.device import pick_device
from mka_export.models.runner import LayerRunner
from mka_export.models.statistics import ColumnStatistics


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(("name", "device"), [("auto", "cuda"), ("cuda", "cuda"), ("cuda:1", "cuda:1"), ("cpu", "cpu")])
def test_with_gpus(two_gpus: None, name: str, device: str) -> None:
    assert pick_device(name) == torch.device(device)


def test_a_gpu_too_many(two_gpus: None) -> None:
    with pytest.raises(UsageError, match="--device cuda:2: there are 2 CUDA devices"):
        pick_device("cuda:2")


def test_without_a_gpu(no_gpu: None) -> None:
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(UsageError, match=r"torch sees no CUDA device\. Use --device cpu, or install a CUDA build"):
        pick_device("cuda")


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "cpu:0:1", ""])
def test_no_device_at_all(name: str) -> None:
    with pytest.raises(UsageError, match="unknown --device"):
        pick_device(name)


def test_layer_passes_run_where_they_are_told(pico_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On torch's meta device, which computes shapes only, and refuses to mix with tensors of another device."""
    monkeypatch.setattr(module, "pick_device", lambda _: torch.device("meta"))
    # transformers looks at a value here, which there is none of; the windows are not packed.
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda _: None)
    runner = LayerRunner(Checkpoint.open(pico_llama), "cuda")
    states = runner.embed(torch.arange(32).view(2, 16))
    statistics, weights = ColumnStatistics(), runner.weights(1)
    after = runner.run_layer(1, weights, states, statistics)
    stream, inputs = runner.before_mlp(1, {name: w for name, w in weights.items() if "mlp." not in name}, states)
    logits = runner.logits(after)
    for tensor in (states, *weights.values(), after, stream, inputs, logits):
        assert tensor.device.type == "meta"
    assert (after.shape, logits.shape) == ((2, 16, 64), (2, 16, 640))
