"""ONNX of real models: as exact as torch is with itself, and small without breaking."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from mka_export.cli import main
from mka_export.inputs import windows_of
from mka_export.models.checkpoint import Checkpoint
from mka_export.models.sources import cache_folder, fetch, resolve
from mka_export.models.text import load_text
from mka_export.models.tokenizer import load_tokenizer
from mka_export.parity.runtimes.genai_runtime import GenaiRuntime
from mka_export.parity.runtimes.onnx_runtime import OnnxRuntime
from mka_export.progress import Progress

pytestmark = pytest.mark.real


@torch.no_grad()
def log_probs(folder: Path, windows: NDArray[np.int64], attention: str) -> NDArray[np.float32]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    return np.stack([model(torch.from_numpy(w[None])).logits[0].log_softmax(-1).numpy() for w in windows])


@pytest.mark.parametrize("model", ["real_smollm2", "real_qwen"])
def test_float32_is_as_close_as_two_attentions_of_torch(model, request, convert_to):
    path = request.getfixturevalue(model)
    checkpoint = Checkpoint.open(fetch(resolve(str(path)), cache_folder(), Progress(quiet=True)).path)
    windows = windows_of(load_text("evaluation", None), load_tokenizer(checkpoint.path), 4, 256).ids
    mine = np.stack(list(OnnxRuntime(convert_to(checkpoint.path, "fp32").path).log_probs(windows)))
    sdpa, eager = (log_probs(checkpoint.path, windows, attention) for attention in ("sdpa", "eager"))
    margin = 4 * np.abs(sdpa - eager).max()
    assert np.abs(mine - sdpa).max() <= margin
    top, mine_top = sdpa.argmax(-1), mine.argmax(-1)
    ties = [
        sdpa[i, j, top[i, j]] - sdpa[i, j, mine_top[i, j]] for i, j in zip(*np.nonzero(top != mine_top), strict=True)
    ]
    print(f"margin {margin:.2e}, ties {ties}")
    assert all(tie <= margin for tie in ties)


def test_four_bits_do_not_break_a_small_model(real_smollm2, shared_data, tmp_path):
    text = ["--text", shared_data / "wikitext2" / "wiki.test.raw", "--windows", "8", "--window-tokens", "256"]
    arguments = ["convert", real_smollm2, "--to", "onnx-int4", "--out", tmp_path / "out", *text, "--json", "--quiet"]
    result = CliRunner().invoke(main, [str(each) for each in arguments])
    assert result.exit_code == 0, result.output
    (target,) = json.loads(result.stdout)["targets"]
    assert target["comparisons"]["conversion"]["kl"]["mean"] < 0.1  # rounded to the nearest it is 0.21
    assert target["artifact"]["nbytes"] < 120e6
    (folder,) = (path for path in (tmp_path / "out" / "onnx-int4").iterdir() if path.is_dir())
    ids = OnnxRuntime(folder).tokenize("The capital of France is")
    apart, together = (runtime(folder).generate([ids], 8) for runtime in (OnnxRuntime, GenaiRuntime))
    assert apart == together
    assert "Paris" in OnnxRuntime(folder).detokenize(together[0])
