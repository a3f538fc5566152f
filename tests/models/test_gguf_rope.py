"""Llama 3.1's rope scaling, found again from the factors that a GGUF file keeps of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mka_export.errors import CheckpointError, UnsupportedError
from mka_export.models.gguf_file import GGUFFile, GGUFTensor
from mka_export.models.gguf_rope import rope_parameters


def file_with(factors: np.ndarray[Any, Any], base: float, **metadata: Any) -> GGUFFile:
    values = factors.astype(np.float32)
    tensor = GGUFTensor(
        "rope_freqs.weight", values.shape, gguf.GGMLQuantizationType.F32, values.view(np.uint8).reshape(1, -1)
    )
    return GGUFFile(Path("model.gguf"), {"llama.rope.freq_base": base, **metadata}, {tensor.name: tensor})


def factors_of(wanted: dict[str, Any], width: int) -> np.ndarray[Any, Any]:
    config = LlamaConfig(
        hidden_size=width, num_attention_heads=1, max_position_embeddings=1 << 17, rope_parameters=wanted
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / wanted["rope_theta"] ** (torch.arange(0, width, 2) / width)
    factors: np.ndarray[Any, Any] = (plain / scaled).numpy()
    return factors


@pytest.mark.parametrize(
    ("width", "factor", "high", "length"),
    [
        (128, 8.0, 4.0, 8192),  # Llama 3.1
        (64, 32.0, 4.0, 8192),  # Llama 3.2 1B
        (128, 32.0, 4.0, 8192),  # Llama 3.2 3B
        (16, 8.0, 4.0, 8192),  # one factor between: nothing to fit
        (128, 4.0, 8.0, 4096),  # others' choices
        (128, 16.0, 2.0, 16384),
    ],
)
def test_the_parameters_are_found_again(width: int, factor: float, high: float, length: int) -> None:
    wanted = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }
    assert rope_parameters(file_with(factors_of(wanted, width), 500_000.0), "llama", width) == wanted


def test_factors_of_one_are_no_scaling() -> None:
    found = rope_parameters(file_with(np.ones(32), 1e4), "llama", 64)
    assert found == {"rope_type": "default", "rope_theta": 1e4}


def test_other_factors_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="not what Llama 3.1's formula gives"):
        rope_parameters(file_with(np.linspace(1, 3, 32), 1e4), "llama", 64)
    with pytest.raises(UnsupportedError, match="and linear rope scaling"):
        rope_parameters(file_with(np.ones(32), 1e4, **{"llama.rope.scaling.factor": 2.0}), "llama", 64)


@pytest.mark.parametrize("factors", [np.ones(31), np.zeros(32), np.full(32, np.nan), np.full(32, np.inf)])
def test_damaged_factors_are_refused(factors: np.ndarray[Any, Any]) -> None:
    with pytest.raises(CheckpointError, match="not 32 factors"):
        rope_parameters(file_with(factors, 1e4), "llama", 64)
