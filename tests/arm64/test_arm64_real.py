"""The same artifacts on another processor: ONNX Runtime's wheel for arm64, and llama.cpp compiled for it, in qemu."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from command import type_in
from exact import with_exact_activations
from ties import NEAR, require_same_or_a_tie

from mka_export.models.text import sample_prompts
from mka_export.parity.runtimes import Runtime
from mka_export.parity.runtimes.llama_cpp_runtime import LlamaCppRuntime
from mka_export.parity.runtimes.onnx_runtime import OnnxRuntime

FOLDER = os.environ.get("MKA_TEST_ARM64", "")
QEMU, TOKENS = "qemu-aarch64-static", 4
# Nats, at most, that rounding what goes into a matrix to 8 bits shifts a likely token by; 0.1 in the mean: docs/onnx.md.
ROUNDED = 0.9
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"there is no {QEMU}"),
    pytest.mark.skipif(not FOLDER, reason="MKA_TEST_ARM64 names no folder that tests/arm64/prepare.sh made"),
]
Ids = list[list[int]]
Generate = Callable[[str, Path, Ids], Ids]


@pytest.fixture(params=["neoverse-n1", "max"])  # without and with the instructions for matrices of int8
def generate(request: pytest.FixtureRequest) -> Generate:
    """``generate(script, model, prompts)`` on an arm64 processor."""
    root, site = Path(FOLDER) / "root", Path(FOLDER) / "site"

    def run(script: str, model: Path, prompts: Ids) -> Ids:
        python = [
            QEMU,
            "-cpu",
            request.param,
            "-L",
            root,
            "-E",
            f"PYTHONPATH={site}",
            root / "usr" / "bin" / "python3.11",
        ]
        command = [*python, Path(__file__).with_name(script), model, json.dumps(prompts), str(TOKENS)]
        made: Ids = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return made

    return run


@pytest.fixture(scope="module")
def gguf(real_smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "out"
    arguments = ["convert", real_smollm2, "--to", "gguf-q4", "--out", out, "--windows", "2", "--window-tokens", "16"]
    type_in(*arguments, "--quiet")
    (path,) = out.glob("gguf-q4/*.gguf")
    return path


def require_the_same(generate: Generate, script: str, model: Path, runtime: Runtime, near: float) -> None:
    prompts = [runtime.tokenize(prompt) for prompt in sample_prompts()]
    for prompt, theirs in zip(prompts, generate(script, model, prompts), strict=True):
        require_same_or_a_tie(runtime, prompt, theirs, runtime.generate([prompt], TOKENS)[0], near)


def test_onnx_runtime_generates_what_it_does_here(generate, four_bits):
    folder = four_bits[0]
    require_the_same(generate, "onnx_generate.py", folder / "onnx" / "model_q4.onnx", OnnxRuntime(folder), ROUNDED)


def test_onnx_runtime_generates_the_same_where_it_does_not_round(generate, four_bits, tmp_path):
    folder = with_exact_activations(four_bits[0], tmp_path / "exact")
    require_the_same(generate, "onnx_generate.py", folder / "onnx" / "model_q4.onnx", OnnxRuntime(folder), NEAR)


def test_llama_cpp_generates_what_it_does_here(generate, gguf):
    with closing(LlamaCppRuntime(gguf)) as runtime:
        require_the_same(generate, "gguf_generate.py", gguf, runtime, ROUNDED)
