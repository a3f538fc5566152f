"""Our ONNX folders in lm-evaluation-harness: by our runtimes, and by the harness's own backends."""

from __future__ import annotations

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.onnxruntime_genai import ONNXRuntimeGenAILM
from lm_eval.models.onnxruntime_ort import ONNXRuntimeLM

from mka_export.parity.harness.frame import Frame
from mka_export.parity.harness.model import RuntimeLM
from mka_export.parity.runtimes import open_runtime
from mka_export.progress import Progress

PAIRS = [
    ("Question: what is a whale?\nAnswer:", answer)
    for answer in (" a fish", " a mammal that lives in the sea, and breathes air", " no", " A", " B")
]
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen."
BACKENDS = {"onnxruntime": ONNXRuntimeLM, "onnxruntime-genai": ONNXRuntimeGenAILM}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_log_likelihoods_are_those_of_the_harness_s_own_backend(name, precision, pico_llama, convert_to, tmp_path):
    path = convert_to(pico_llama, precision).path
    runtime = open_runtime(name, path)
    models = RuntimeLM(runtime, Frame.of(path), tmp_path, Progress(quiet=True)), BACKENDS[name](str(path))
    pairs = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)]
    found, expected = (model.loglikelihood(pairs) for model in models)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    texts = [Instance("loglikelihood_rolling", {}, (TEXT,), 0)]
    found, expected = (model.loglikelihood_rolling(texts) for model in models)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    runtime.close()


@pytest.mark.parametrize("name", BACKENDS)
def test_texts_as_long_as_the_context_and_generation(name, pico_llama, convert_to, tmp_path):
    path = convert_to(pico_llama, "fp32").path
    runtime, torch = open_runtime(name, path), open_runtime("torch", pico_llama)
    (tmp_path / "torch").mkdir()
    models = (
        RuntimeLM(runtime, Frame.of(path), tmp_path, Progress(quiet=True)),
        RuntimeLM(torch, Frame.of(pico_llama), tmp_path / "torch", Progress(quiet=True)),
    )
    texts = [Instance("loglikelihood_rolling", {}, ("One. " * 200,), 0)]
    found, expected = (model.loglikelihood_rolling(texts) for model in models)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    settings = {"until": ["th"], "max_gen_toks": 20}
    asked = [Instance("generate_until", {}, (text, settings), 0) for text in ("Once upon a time", "The sea")]
    found, expected = (model.generate_until(asked) for model in models)
    assert found == expected
    runtime.close()
