"""ONNX of real models: as exact as torch, and small without breaking."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from ties import require_same_or_a_tie
from torch.nn.functional import rms_norm
from transformers import AutoModelForCausalLM

from mka_export.inputs import windows_of
from mka_export.models.checkpoint import Checkpoint
from mka_export.models.sources import cache_folder, fetch, resolve
from mka_export.models.text import load_text, sample_prompts, tokenizer_corpus
from mka_export.models.tokenizer import load_tokenizer
from mka_export.parity.runtimes.genai_runtime import GenaiRuntime
from mka_export.parity.runtimes.onnx_runtime import OnnxRuntime
from mka_export.parity.runtimes.torch_runtime import TorchRuntime
from mka_export.parity.tokenizer_check import first_difference, without_misread
from mka_export.progress import Progress

pytestmark = pytest.mark.real


@torch.no_grad()
def log_probs(
    folder: Path, windows: NDArray[np.int64], dtype: torch.dtype, attention: str = "sdpa"
) -> NDArray[np.floating]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    for norm in (each for each in model.modules() if type(each).__name__.endswith("RMSNorm")):
        if dtype == torch.float64:  # transformers would compute it in float32
            norm.forward = partial(
                rms_norm, normalized_shape=norm.weight.shape, weight=norm.weight, eps=norm.variance_epsilon
            )
    return np.stack([model(torch.from_numpy(w[None])).logits[0].log_softmax(-1).numpy() for w in windows])


@pytest.mark.parametrize("model", ["real_smollm2", "real_qwen"])
def test_float32_is_as_close_to_float64_as_torch(model, request, convert_to):
    path = request.getfixturevalue(model)
    checkpoint = Checkpoint.open(fetch(resolve(str(path)), cache_folder(), Progress(quiet=True)).path)
    windows = windows_of(load_text("evaluation", None), load_tokenizer(checkpoint.path), 2, 256).ids
    exact = log_probs(checkpoint.path, windows, torch.float64)
    errors = {
        name: np.abs(made - exact)
        for name, made in {
            "onnxruntime": np.stack(list(OnnxRuntime(convert_to(checkpoint.path, "fp32").path).log_probs(windows))),
            "sdpa": log_probs(checkpoint.path, windows, torch.float32),
            "eager": log_probs(checkpoint.path, windows, torch.float32, "eager"),
        }.items()
    }
    largest = {name: float(each.max()) for name, each in errors.items()}
    typical = {name: float(np.sqrt(np.square(each).mean())) for name, each in errors.items()}
    print(f"from float64, in log-probabilities: at most {largest}, root mean square {typical}")
    assert largest["onnxruntime"] <= 2 * min(largest["sdpa"], largest["eager"])
    assert typical["onnxruntime"] <= 2 * min(typical["sdpa"], typical["eager"])


@pytest.mark.parametrize("model", ["real_smollm2", "real_qwen"])
def test_onnxruntime_genai_reads_text_as_the_original(model, request, convert_to, shared_data):
    path = request.getfixturevalue(model)
    checkpoint = Checkpoint.open(fetch(resolve(str(path)), cache_folder(), Progress(quiet=True)).path)
    original, genai = TorchRuntime(checkpoint.path), GenaiRuntime(convert_to(checkpoint.path, "fp32").path)
    wikitext = (shared_data / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8")
    texts, misread = without_misread(genai.name, [*tokenizer_corpus(), wikitext])
    assert first_difference(original, genai, texts) is None
    assert first_difference(original, genai, misread) is not None  # when it reads these too, look anew


def test_four_bits_do_not_break_a_small_model(four_bits):
    folder, result = four_bits
    assert result.exit_code == 0, result.output
    (target,) = json.loads(result.stdout)["targets"]
    assert target["comparisons"]["conversion"]["kl"]["mean"] < 0.05  # rounded to the nearest, it is 0.2 and more
    assert target["artifact"]["nbytes"] < 125e6
    ids = OnnxRuntime(folder).tokenize("The capital of France is")
    apart, together = (runtime(folder).generate([ids], 8) for runtime in (OnnxRuntime, GenaiRuntime))
    assert apart == together
    assert "Paris" in OnnxRuntime(folder).detokenize(together[0])


def test_onnx_runtime_makes_its_own_format_of_it(four_bits, tmp_path):
    """As docs/onnx.md has it."""
    graph = four_bits[0] / "onnx" / "model_q4.onnx"
    tool = [sys.executable, "-m", "onnxruntime.tools.convert_onnx_models_to_ort", graph, "--output_dir", tmp_path]
    subprocess.run([*tool, "--optimization_style", "Fixed"], check=True, capture_output=True)
    assert "GroupQueryAttention,MatMulNBits" in (tmp_path / "model_q4.required_operators.config").read_text()
    sessions = [onnxruntime.InferenceSession(path) for path in (graph, tmp_path / "model_q4.ort")]
    inputs: dict[str, NDArray[Any]] = {"input_ids": np.array([[5, 6, 7]]), "attention_mask": np.ones((1, 3), np.int64)}
    for each in sessions[0].get_inputs():
        if each.name not in inputs:
            inputs[each.name] = np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32)
    expected, found = (session.run(["logits"], inputs)[0] for session in sessions)
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.fixture(scope="module")
def transformers_js(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"there is no {program}")
    folder = tmp_path_factory.mktemp("node") / "client"
    shutil.copytree(Path(__file__).parent / "transformers_js", folder)
    # Its packages' scripts would fetch CUDA libraries; what npm fetches is checked against the hashes of the lock file.
    subprocess.run(["npm", "ci", "--ignore-scripts", "--no-audit"], cwd=folder, check=True, capture_output=True)
    return folder


def test_transformers_js_generates_what_onnxruntime_genai_does(four_bits, transformers_js):
    folder, tokens = four_bits[0], 24
    command = ["node", "generate.mjs", folder, json.dumps(sample_prompts()), str(tokens)]
    done = subprocess.run(command, cwd=transformers_js, check=True, capture_output=True, text=True)
    genai, runtime = GenaiRuntime(folder), OnnxRuntime(folder)
    for prompt, made in zip(sample_prompts(), json.loads(done.stdout), strict=True):
        ids = genai.tokenize(prompt)
        assert made["prompt"] == ids
        require_same_or_a_tie(runtime, ids, made["all"][len(ids) :], genai.generate([ids], tokens)[0])


def test_transformers_js_reads_text_as_the_original(four_bits, transformers_js):
    texts, _ = without_misread(GenaiRuntime.name, tokenizer_corpus())  # it knows no digits but 0 to 9 either
    command = ["node", "tokenize.mjs", four_bits[0], json.dumps(texts)]
    done = subprocess.run(command, cwd=transformers_js, check=True, capture_output=True, text=True)
    runtime = OnnxRuntime(four_bits[0])
    for text, ids in zip(texts, json.loads(done.stdout), strict=True):
        assert ids == runtime.tokenize(text), text
