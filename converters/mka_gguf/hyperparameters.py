"""The model's hyper-parameters as GGUF metadata: what the config says, in llama.cpp's words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from gguf import GGUFWriter, RopeScalingType
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mka_export.errors import ConversionError, UnsupportedError
from mka_export.models.checkpoint import CONFIG, Checkpoint

FREE_HEAD_DIM = {"llama"}  # architectures of llama.cpp whose heads need not share out the hidden size
ROPE_FACTORS = {"llama"}  # architectures of llama.cpp that read rope_freqs.weight


def read_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """Read ``config.json`` as transformers does, so that keys it leaves out have their defaults.

    Raises:
        ConversionError: transformers refuses it.
        UnsupportedError: it asks for something that llama.cpp's architecture does not compute.
    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            checkpoint.path, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # transformers raises whatever its validators raise
        raise ConversionError(f"transformers cannot read {checkpoint.path / CONFIG}: {error}") from error
    refuse = _refuser(checkpoint)
    if config.hidden_act != "silu":
        refuse(f"hidden_act = {config.hidden_act!r}", "llama.cpp computes silu")
    if "rope_type" not in config.rope_parameters:
        refuse("rotary embeddings that differ between layers", "llama.cpp has one for all")
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        refuse("a partial_rotary_factor", "llama.cpp turns whole heads")
    if strange := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        refuse(f"layer_types {', '.join(sorted(strange))}", "llama.cpp has full attention")
    heads_fill = head_dim(config) * config.num_attention_heads == config.hidden_size
    if not heads_fill and checkpoint.architecture.gguf_arch not in FREE_HEAD_DIM:
        refuse(f"head_dim = {head_dim(config)}", "llama.cpp shares the hidden size out among the heads")
    return config


def head_dim(config: PretrainedConfig) -> int:
    """Return the width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def usable_context(config: PretrainedConfig) -> int:
    """Return the number of positions over which llama.cpp computes what transformers computes.

    llama.cpp's ``llama`` and ``qwen2`` attend to everything; a model with a sliding window does the same
    up to the window's length.
    """
    length = int(config.max_position_embeddings)
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or (kinds is not None and "sliding_attention" not in kinds):
        return length
    return min(length, window)


def add_hyperparameters(writer: GGUFWriter, config: PretrainedConfig, vocab_size: int) -> None:
    """Write the keys that llama.cpp's ``convert_hf_to_gguf`` writes for these architectures.

    Args:
        writer: of the file.
        config: from ``read_config``.
        vocab_size: embedding rows.
    """
    width = head_dim(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(usable_context(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(vocab_size)
    writer.add_rope_dimension_count(width)
    if width * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(width)
        writer.add_value_length(width)


def add_rope(writer: GGUFWriter, config: PretrainedConfig, checkpoint: Checkpoint) -> Tensor | None:
    """Write the rotary embedding's base and scaling.

    Returns:
        the tensor ``rope_freqs.weight``, (head_dim / 2,), by which llama.cpp divides the frequencies, where the
        scaling is one that metadata cannot say (``llama3``); else None.

    Raises:
        UnsupportedError: llama.cpp has no such scaling.
    """
    rope: dict[str, Any] = config.rope_parameters
    kind, base = rope["rope_type"], float(rope["rope_theta"])
    writer.add_rope_freq_base(base)
    if kind == "default":
        return None
    refuse = _refuser(checkpoint)
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        return None
    if kind == "yarn":
        _add_yarn(writer, config, checkpoint)
        return None
    if kind != "llama3" or checkpoint.architecture.gguf_arch not in ROPE_FACTORS:
        refuse(f"rope scaling {kind!r}", f"llama.cpp's {checkpoint.architecture.gguf_arch} does not compute it")
    width = head_dim(config)
    plain = 1.0 / (base ** (torch.arange(0, width, 2, dtype=torch.int64).to(torch.float32) / width))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return plain / scaled


def _add_yarn(writer: GGUFWriter, config: PretrainedConfig, checkpoint: Checkpoint) -> None:
    rope: dict[str, Any] = config.rope_parameters
    refuse = _refuser(checkpoint)
    if rope.get("truncate", True) is not True:
        refuse("yarn without truncate", "llama.cpp rounds the correction range")
    for key, fixed in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        # It has metadata for them, which it reads for other architectures only.
        if rope.get(key, fixed) != fixed:
            refuse(f"yarn with {key} = {rope[key]}", f"llama.cpp takes {fixed:g}")
    factor = float(rope["factor"])
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(factor)
    writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    # llama.cpp multiplies the rotated vectors by the paper's 0.1 ln(factor) + 1 of its own accord, and by
    # rope.scaling.attn_factor; of yarn_attn_factor, which its converter writes, it makes no use.
    _, attention = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    paper = 0.1 * float(torch.log(torch.tensor(factor, dtype=torch.float64))) + 1.0
    if abs(attention / paper - 1.0) > 1e-6:
        writer.add_rope_scaling_attn_factors(attention / paper)


def _refuser(checkpoint: Checkpoint) -> Callable[[str, str], NoReturn]:
    def refuse(feature: str, reason: str) -> NoReturn:
        raise UnsupportedError(f"{checkpoint.path / CONFIG} has {feature}, which a GGUF cannot express: {reason}")

    return refuse
