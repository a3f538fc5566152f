"""A runtime in a process of its own gives what it gives in ours; what kills it is only a failure."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import numpy as np
import pytest

from mka_export.errors import RuntimeFailure, UsageError
from mka_export.parity.runtimes import Runtime, open_runtime
from mka_export.parity.runtimes.isolated import IsolatedRuntime
from mka_export.parity.runtimes.llama_cpp_runtime import LlamaCppRuntime


class Hanging:
    name, device, vocab_size, ends = "hanging", "cpu", 3, frozenset[int]()

    def tokenize(self, text: str) -> list[int]:
        time.sleep(600)
        return []


def open_hanging(path: Path) -> Runtime:
    return Hanging()  # type: ignore[return-value]


def test_the_same_results_as_in_our_own_process(pico_gguf: Path) -> None:
    ours, other = LlamaCppRuntime(pico_gguf), open_runtime("llama.cpp", pico_gguf)
    assert isinstance(other, IsolatedRuntime)
    assert (other.name, other.device, other.vocab_size) == ("llama.cpp", "cpu", 640)
    ids = ours.tokenize("def f(x):\n  return x")
    assert other.tokenize("def f(x):\n  return x") == ids
    assert other.detokenize(ids) == "def f(x):\n  return x"
    windows = np.array([[*ids, *range(3, 303)], [*range(200, 500), *ids]])  # longer than one message
    for one, two in zip(ours.log_probs(windows), other.log_probs(windows), strict=True):
        np.testing.assert_array_equal(one, two)
    assert other.generate([ids, [5, 6]], 6) == ours.generate([ids, [5, 6]], 6)
    other.close()
    ours.close()


def test_a_file_that_makes_llama_cpp_abort_is_a_failure(pico_gguf: Path, tmp_path: Path) -> None:
    """Its loader asserts the number of layers instead of checking it."""
    data, key = pico_gguf.read_bytes(), b"llama.block_count" + struct.pack("<I", 4)
    at = data.index(key) + len(key)
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(data[:at] + struct.pack("<I", 5000) + data[at + 4 :])
    with pytest.raises(RuntimeFailure, match=r"bad\.gguf crashed \(SIG") as caught:
        open_runtime("llama.cpp", bad)
    assert "GGML_ASSERT" in caught.value.what


def test_a_runtime_that_hangs_is_given_up(tmp_path: Path) -> None:
    runtime = IsolatedRuntime(open_hanging, tmp_path)  # it starts as slowly as the machine is
    runtime._child.patience = 0.2
    with pytest.raises(RuntimeFailure, match="no sign of life"):
        runtime.tokenize("x")


def test_refusals_come_through(pico_gguf: Path) -> None:
    with pytest.raises(UsageError, match="--gpu-layers 3"):
        open_runtime("llama.cpp", pico_gguf, gpu_layers=3)
