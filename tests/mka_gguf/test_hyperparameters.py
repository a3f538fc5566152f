"""What the config says reaches llama.cpp: metadata, rotary embeddings, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGUFReader
from transformers import LlamaConfig

from mka_export.errors import ConversionError, UnsupportedError

IDS = np.random.default_rng(5).integers(3, 640, 400).tolist()  # beyond the 64 positions the scalings start from
SCALINGS = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64},
    "yarn, own attention factor": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.5,
    },
}


def metadata(path) -> dict[str, object]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


@pytest.mark.parametrize("scaling", SCALINGS)
def test_rope_scaling_computes_the_same(pico_llama, scaling, edited, convert_to, logprobs):
    folder = edited(pico_llama, rope_parameters=SCALINGS[scaling])
    artifact = convert_to(folder, "f32")
    ours, reference = logprobs(artifact.path, folder, IDS)
    assert np.abs(ours - reference).max() < 1e-3
    names = {t.name for t in GGUFReader(artifact.path).tensors}
    assert ("rope_freqs.weight" in names) == (scaling == "llama3")


def test_old_spelling_of_rope_scaling(pico_llama, edited, convert_to):
    old = {k: v for k, v in SCALINGS["llama3"].items() if k != "rope_theta"}
    folder = edited(pico_llama, rope_parameters=None, rope_theta=500000.0, rope_scaling=old)
    artifact = convert_to(folder, "f32")
    assert metadata(artifact.path)["llama.rope.freq_base"] == 500000.0
    factors = next(t for t in GGUFReader(artifact.path).tensors if t.name == "rope_freqs.weight").data
    assert factors[0] == 1.0
    assert factors[-1] == pytest.approx(8.0)


def test_metadata(pico_llama, edited, convert_to):
    folder = edited(pico_llama)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\n---\n# Pico\n")
    found = metadata(convert_to(folder, "f16", file_stem="pico").path)
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "pico",
        "general.license": "apache-2.0",
        "general.file_type": 1,
        "general.quantization_version": 2,
        "llama.block_count": 6,
        "llama.context_length": 512,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 160,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": 16,
        "llama.vocab_size": 640,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert found["general.size_label"].endswith("K")
    assert not any("key_length" in name for name in found)


def test_wide_heads(random_model, convert_to, logprobs):
    config = LlamaConfig(
        vocab_size=640,
        hidden_size=64,
        head_dim=32,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        attention_bias=True,
        mlp_bias=True,
    )
    folder = random_model(config)
    artifact = convert_to(folder, "f32")
    assert metadata(artifact.path)["llama.attention.key_length"] == 32
    ours, reference = logprobs(artifact.path, folder, IDS)
    assert np.abs(ours - reference).max() < 1e-3


def test_sliding_window_limits_the_context(pico_llama, pico_qwen2, edited, convert_to):
    mistral = edited(pico_llama, architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=96)
    artifact = convert_to(mistral, "f16")
    assert metadata(artifact.path)["llama.context_length"] == 96
    assert "context length 96 instead of 512" in artifact.details["warnings"][0]
    kinds = ["full_attention"] * 3 + ["sliding_attention"] * 3
    qwen = edited(pico_qwen2, use_sliding_window=True, sliding_window=128, max_window_layers=3, layer_types=kinds)
    assert metadata(convert_to(qwen, "f16").path)["qwen2.context_length"] == 128


@pytest.mark.parametrize(
    "case",
    [
        ("pico_llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("pico_llama", {"rope_parameters": {**SCALINGS["linear"], "rope_type": "dynamic"}}, "rope scaling 'dynamic'"),
        ("pico_llama", {"rope_parameters": {**SCALINGS["yarn"], "truncate": False}}, "yarn without truncate"),
        ("pico_llama", {"rope_parameters": {**SCALINGS["yarn"], "beta_fast": 16.0}}, "beta_fast = 16.0"),
        ("pico_qwen2", {"rope_parameters": SCALINGS["llama3"]}, "rope scaling 'llama3'"),
        ("pico_qwen2", {"layer_types": ["full_attention"] * 5 + ["linear_attention"]}, "linear_attention"),
    ],
)
def test_what_llama_cpp_lacks_is_refused(case, request, edited, convert_to):
    family, changes, words = case
    folder = edited(request.getfixturevalue(family), **changes)
    with pytest.raises(UnsupportedError, match=words):
        convert_to(folder, "f16")


def test_config_that_transformers_refuses(pico_llama, edited, convert_to):
    folder = edited(pico_llama, num_attention_heads="many")
    with pytest.raises(ConversionError, match=r"config\.json"):
        convert_to(folder, "f16")
