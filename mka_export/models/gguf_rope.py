"""The rotary embedding of a GGUF file, in the words of transformers' ``rope_parameters``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mka_export.errors import CheckpointError, UnsupportedError
from mka_export.models.gguf_file import GGUFFile

ROPE_FACTORS = "rope_freqs.weight"  # (head_dim / 2,): llama.cpp divides the frequencies by these
DEFAULT_BASE = 10_000.0
MAX_BASE = 1e12  # released models have up to 1e8
TOLERANCE = 1e-3  # of the factors, relative


def rope_parameters(file: GGUFFile, arch: str, head_dim: int) -> dict[str, Any]:
    """Return the ``rope_parameters`` of the config.

    Args:
        file: the GGUF file.
        arch: its ``general.architecture``.
        head_dim: the width of a head.

    Raises:
        CheckpointError: a value that cannot be.
        UnsupportedError: a kind of scaling that transformers does not compute, or Llama 3.1's frequency factors
            where they are not what its formula gives.
    """
    base = file.find(f"{arch}.rope.freq_base", float) or DEFAULT_BASE
    plain: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    scaling = f"{arch}.rope.scaling"
    factor = file.find(f"{scaling}.factor", float) or file.find(f"{arch}.rope.scale_linear", float) or 1.0
    if not (1 < base <= MAX_BASE and factor > 0):
        raise CheckpointError(
            f"{file.path} has the rotary base {base} and scaling factor {factor}", "Fetch the file again."
        )
    kind = file.find(f"{scaling}.type", str) or ("linear" if factor != 1.0 else "none")
    if ROPE_FACTORS in file.tensors:
        if kind != "none":
            raise UnsupportedError(f"{file.path} has {ROPE_FACTORS} and {kind} rope scaling", "Use another model.")
        factors = file.tensors[ROPE_FACTORS].rows(0, 1)[0].astype(np.float64)
        if file.tensors[ROPE_FACTORS].shape != (head_dim // 2,) or not ((factors >= 1) & np.isfinite(factors)).all():
            raise CheckpointError(
                f"{file.path}: {ROPE_FACTORS} is not {head_dim // 2} factors of at least 1", "Fetch the file again."
            )
        return plain if (factors == 1).all() else {**plain, **_llama3(file, base, head_dim, factors)}
    if kind == "none" or factor == 1.0:
        return plain
    if kind == "linear":
        return {**plain, "rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return {**plain, "rope_type": "yarn", "factor": factor, **_yarn(file, scaling, factor)}
    raise UnsupportedError(f"{file.path} has rope scaling {kind!r}", "none, linear, yarn and Llama 3.1's are read.")


def _yarn(file: GGUFFile, scaling: str, factor: float) -> dict[str, Any]:
    found: dict[str, Any] = {"original_max_position_embeddings": file.get(f"{scaling}.original_context_length", int)}
    for key in ("beta_fast", "beta_slow"):
        if (value := file.find(f"{scaling}.yarn_{key}", float)) is not None:
            found[key] = value
    # llama.cpp multiplies by the paper's 0.1 ln(factor) + 1 of its own accord, transformers where nothing is said.
    if (attention := file.find(f"{scaling}.attn_factor", float)) not in (None, 1.0):
        found["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
    return found


def _llama3(file: GGUFFile, base: float, head_dim: int, factors: NDArray[np.float64]) -> dict[str, Any]:
    """Find the parameters of Llama 3.1's scaling that give these factors.

    With s = (L / wavelength - low) / (high - low), a factor is f where s <= 0, 1 where s >= 1, and between them
    1 / ((1 - s) / f + s) (transformers' ``_compute_llama3_parameters``). Only L / (high - low) and low / (high - low)
    can be told, so low is 1, as in every released model; where fewer than two factors lie between, high is 4
    and L is 8192 as there. What is found is checked against all factors.
    """
    factor = float(np.round(factors.max(), 4))
    waves = 2 * math.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    between = (factors > 1.0001) & (factors < factor * 0.9999)
    candidates = [(4.0, 8192)]
    if between.sum() >= 2:
        smooth = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
        slope, offset = np.polyfit(1 / waves[between], smooth, 1)
        if -100 < offset < -1e-6:  # high is between 1.01 and 1e6
            high = 1 - 1 / offset
            candidates.insert(0, (float(np.round(high, 2)), round(slope * (high - 1))))
    for high, length in candidates:
        smooth = np.clip((length / waves - 1) / (high - 1), 0, 1)
        if np.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=TOLERANCE):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": length,
            }
    raise UnsupportedError(
        f"{file.path}: {ROPE_FACTORS} is not what Llama 3.1's formula gives", "Use the model it was made from."
    )
