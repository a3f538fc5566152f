"""The same folder on another processor: ONNX Runtime's wheel for arm64, in qemu."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from ties import require_same_or_a_tie

from mka_export.models.text import sample_prompts
from mka_export.parity.runtimes.onnx_runtime import OnnxRuntime

pytestmark = pytest.mark.real
QEMU, TOKENS = "qemu-aarch64-static", 4
HERE = Path(__file__).parent / "arm64"


@pytest.fixture(scope="module")
def arm64() -> Path:
    if shutil.which(QEMU) is None:
        pytest.skip(f"there is no {QEMU}")
    if not (folder := os.environ.get("MKA_TEST_ARM64")):
        pytest.skip("MKA_TEST_ARM64 names no folder that tests/mka_onnx/arm64/prepare.sh made")
    return Path(folder)


@pytest.mark.parametrize("processor", ["neoverse-n1", "max"])  # without and with the instructions for matrices of int8
def test_arm64_generates_what_this_machine_does(processor, arm64, four_bits):
    runtime = OnnxRuntime(four_bits[0])
    prompts = [runtime.tokenize(prompt) for prompt in sample_prompts()]
    python = [QEMU, "-cpu", processor, "-L", arm64 / "root", "-E", f"PYTHONPATH={arm64 / 'site'}"]
    command = [*python, arm64 / "root" / "usr" / "bin" / "python3.11", HERE / "generate.py"]
    graph = four_bits[0] / "onnx" / "model_q4.onnx"
    done = subprocess.run(
        [*command, graph, json.dumps(prompts), str(TOKENS)], check=True, capture_output=True, text=True
    )
    for prompt, theirs in zip(prompts, json.loads(done.stdout), strict=True):
        require_same_or_a_tie(runtime, prompt, theirs, runtime.generate([prompt], TOKENS)[0])
