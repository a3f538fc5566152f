"""A pico GGUF file, written here and not by the converter: parity's tests stand on their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import gguf
import pytest
from pico import CHAT_TEMPLATE

from mka_export.models.checkpoint import Checkpoint

NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def write_gguf(
    checkpoint: Checkpoint,
    path: Path,
    chat_template: str = CHAT_TEMPLATE,
    eos: int = 2,
    special: Collection[int] = (0, 1, 2),
) -> Path:
    config = checkpoint.config
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10_000.0)}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(checkpoint.num_layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(checkpoint.hidden_size)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(checkpoint.vocab_size)

    tokenizer = json.loads((checkpoint.path / "tokenizer.json").read_text())
    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")  # digits one by one, then GPT-2's pattern: as the pico tokenizer
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for _, i in vocabulary])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(eos)
    writer.add_add_bos_token(False)
    writer.add_chat_template(chat_template)

    for name in checkpoint.shards:
        tensor = checkpoint.tensor(name).float().numpy()
        index, inside = checkpoint.architecture.split(name)
        if index is None:
            outside = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
            writer.add_tensor(outside[name], tensor)
            continue
        if inside.startswith(("self_attn.q_proj", "self_attn.k_proj")):
            n = heads if "q_proj" in inside else kv_heads
            tensor = tensor.reshape(n, 2, tensor.shape[0] // n // 2, -1).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"blk.{index}.{NAMES[inside]}", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def pico_gguf(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(Checkpoint.open(pico_llama), tmp_path_factory.mktemp("gguf") / "pico.gguf")


@pytest.fixture(scope="session")
def gguf_like(pico_llama: Path) -> Callable[..., Path]:
    """``gguf_like(path, **changes)``: write pico llama's file with something changed; see ``write_gguf``."""

    def write(path: Path, checkpoint: Checkpoint | None = None, **changes: Any) -> Path:
        return write_gguf(checkpoint or Checkpoint.open(pico_llama), path, **changes)

    return write
