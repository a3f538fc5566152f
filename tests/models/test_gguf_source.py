"""GGUF -> checkpoint: the same model in transformers as in llama.cpp, whatever the file is quantized to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mka_export.errors import CheckpointError, MkaError, UnsupportedError
from mka_export.models.checkpoint import Checkpoint, read_json
from mka_export.models.gguf_file import read_gguf
from mka_export.models.gguf_source import gguf_to_checkpoint
from mka_export.progress import Progress

SAMPLES = Path(__file__).parents[2] / "sample_prompts"
IDS = [[1, 300, 7, 450, 88, 2, 301, 512, 9, 77, 140, 33]]
QUIET = Progress(quiet=True)

Write = Callable[..., Path]


def llama_cpp_order(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Order the rows of q or k as llama.cpp's converter does (LlamaModel.permute)."""
    parts = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return parts.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    source: Path,
    path: Path,
    kinds: Mapping[str, Kind] | Kind = Kind.F32,
    change: Callable[[gguf.GGUFWriter], None] | None = None,
) -> Path:
    """Write pico checkpoint ``source`` as a GGUF file, with the gguf package alone.

    Args:
        source: the checkpoint.
        path: the file.
        kinds: the type of every matrix, or GGUF tensor name -> type (F32 for the rest).
        change: called with the writer before it writes.
    """
    config = read_json(source / "config.json")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    arch = config["model_type"]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("Pico")
    writer.add_license("apache-2.0")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    add_tokenizer(writer, source)
    if change:
        change(writer)
    names = gguf.get_tensor_name_map(
        {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch], config["num_hidden_layers"]
    )
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        values = tensor.numpy()
        part = name.split(".")[-2]
        if arch == "llama" and part in heads:
            values = llama_cpp_order(values, heads[part])
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None
        kind = kinds if isinstance(kinds, Kind) else kinds.get(stored, Kind.F32)
        if values.ndim == 1 or kind == Kind.F32:
            writer.add_tensor(stored, values)
        else:
            writer.add_tensor(stored, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: gguf.GGUFWriter, source: Path) -> None:
    tokenizer = read_json(source / "tokenizer.json")
    special = {token["id"] for token in tokenizer["added_tokens"]}
    vocab = tokenizer["model"]["vocab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(sorted(vocab, key=vocab.__getitem__))
    writer.add_token_types(
        [gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(len(vocab))]
    )
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0]['content'] }}<|im_end|>")


def converted(path: Path) -> Path:
    out = path.with_suffix("")
    out.mkdir()
    gguf_to_checkpoint(path, out, QUIET)
    return out


def logits(checkpoint: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        result: torch.Tensor = model(torch.tensor(IDS)).logits[0]
    return result


def llama_cpp_logits(path: Path) -> torch.Tensor:
    llama = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0)
    llama.eval(IDS[0])
    return torch.from_numpy(llama.scores[: len(IDS[0])].copy())


@pytest.mark.parametrize("family", ["pico_llama", "pico_qwen2"])
def test_float32_comes_back_bit_for_bit(family: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source = request.getfixturevalue(family)
    out = converted(write_gguf(source, tmp_path / "pico.gguf"))
    torch.testing.assert_close(logits(out), logits(source), rtol=0, atol=0)
    before, after = Checkpoint.open(source), Checkpoint.open(out)
    assert set(after.shards) == set(before.shards)
    assert all(torch.equal(after.tensor(name), before.tensor(name)) for name in before.shards)
    assert {**after.config, "transformers_version": ""} == {**before.config, "transformers_version": ""}


@pytest.mark.parametrize("family", ["pico_llama", "pico_qwen2"])
def test_llama_cpp_computes_the_same(family: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    path = write_gguf(request.getfixturevalue(family), tmp_path / "pico.gguf")
    torch.testing.assert_close(logits(converted(path)), llama_cpp_logits(path), rtol=1e-3, atol=1e-3)


MIXTURE = {
    "token_embd.weight": Kind.Q8_0,
    "blk.0.attn_q.weight": Kind.Q4_0,
    "blk.0.attn_k.weight": Kind.Q5_1,
    "blk.1.ffn_down.weight": Kind.F16,
    "blk.2.attn_v.weight": Kind.BF16,
}


@pytest.mark.parametrize(
    ("kinds", "dtype"),
    [
        (Kind.Q8_0, "float16"),
        (Kind.Q4_1, "float16"),
        (Kind.BF16, "bfloat16"),
        (Kind.F16, "float16"),
        (MIXTURE, "float16"),
    ],
)
def test_quantized_files_become_their_values(kinds: Any, dtype: str, pico_llama: Path, tmp_path: Path) -> None:
    path = write_gguf(pico_llama, tmp_path / "pico.gguf", kinds)
    checkpoint = Checkpoint.open(converted(path))
    assert checkpoint.config["dtype"] == dtype
    assert {str(checkpoint.tensor(name).dtype) for name in checkpoint.shards} == {f"torch.{dtype}"}
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for stored, name, heads in [
        ("token_embd.weight", "model.embed_tokens.weight", None),
        ("blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight", 4),
        ("blk.0.attn_k.weight", "model.layers.0.self_attn.k_proj.weight", 2),
        ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight", None),
    ]:
        expected = gguf.quants.dequantize(tensors[stored].data, tensors[stored].tensor_type)
        found = checkpoint.tensor(name)
        back = found.float().numpy()
        back = llama_cpp_order(back, heads) if heads else back
        np.testing.assert_array_equal(back, torch.from_numpy(expected.copy()).to(found.dtype).float().numpy())


def test_llama_3_scaling_computes_as_in_llama_cpp(pico_llama: Path, tmp_path: Path) -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    wanted = {"rope_type": "llama3", "rope_theta": 500_000.0, **scaling}
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=512, rope_parameters=wanted)
    plain = 1.0 / 500_000.0 ** (torch.arange(0, 16, 2) / 16)
    factors = plain / ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]

    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())
        writer.kv_data[0]["llama.rope.freq_base"].value = 500_000.0

    path = write_gguf(pico_llama, tmp_path / "pico.gguf", change=change)
    out = converted(path)
    assert Checkpoint.open(out).config["rope_parameters"] == wanted
    torch.testing.assert_close(logits(out), llama_cpp_logits(path), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_rope_scaling_computes_as_in_llama_cpp(kind: str, pico_llama: Path, tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_string("llama.rope.scaling.type", kind)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(128)

    path = write_gguf(pico_llama, tmp_path / "pico.gguf", change=change)
    out = converted(path)
    assert Checkpoint.open(out).config["rope_parameters"]["rope_type"] == kind
    torch.testing.assert_close(logits(out), llama_cpp_logits(path), rtol=1e-3, atol=1e-3)


def test_the_folder_is_complete(pico_llama: Path, tmp_path: Path) -> None:
    out = converted(write_gguf(pico_llama, tmp_path / "pico.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi<|im_end|>"
    assert GenerationConfig.from_pretrained(out).eos_token_id == 2
    card = gguf.Metadata.load_model_card(out)
    assert (card["license"], card["model_name"]) == ("apache-2.0", "Pico")
    assert not [path for path in out.iterdir() if path.suffix == ".bin"]


def setting(key: str, value: Any) -> Callable[[gguf.GGUFWriter], None]:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop(key, None)
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)

    return change


def tensor(name: str) -> Callable[[gguf.GGUFWriter], None]:
    return lambda writer: writer.add_tensor(name, np.ones((4, 4), np.float32))


def longrope(writer: gguf.GGUFWriter) -> None:
    writer.add_string("llama.rope.scaling.type", "longrope")
    writer.add_rope_scaling_factor(4.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (setting("general.architecture", "mamba"), UnsupportedError, "unknown GGUF architecture 'mamba'"),
        (setting("llama.expert_count", 8), UnsupportedError, "mixture of experts"),
        (setting("llama.rope.dimension_count", 8), UnsupportedError, "rope.dimension_count is not the head's width 16"),
        (longrope, UnsupportedError, "rope scaling 'longrope'"),
        (setting("tokenizer.ggml.model", "bert"), UnsupportedError, "tokenizer of kind 'bert'"),
        (setting("tokenizer.ggml.pre", "qwen-2"), UnsupportedError, "did you mean qwen2"),
        (setting("llama.block_count", 4_000_000_000), CheckpointError, "announces 4000000000 layers"),
        (setting("llama.block_count", 7), CheckpointError, "lacks tensors: model.layers.6"),
        (setting("llama.block_count", 0), CheckpointError, "block_count is 0"),
        (setting("llama.embedding_length", 128), CheckpointError, "its metadata say"),
        (setting("llama.attention.head_count", "four"), CheckpointError, "head_count is no int"),
        (tensor("blk.0.ffn_gate_exps.weight"), UnsupportedError, "blk.0.ffn_gate_exps.weight"),
    ],
)
def test_what_cannot_be_read_is_named(
    change: Any, error: type[MkaError], message: str, pico_llama: Path, tmp_path: Path
) -> None:
    path = write_gguf(pico_llama, tmp_path / "pico.gguf", change=change)
    with pytest.raises(error, match=message):
        converted(path)


def test_a_value_beyond_float16_is_named(pico_llama: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(pico_llama)
    path = write_gguf(pico_llama, tmp_path / "pico.gguf", Kind.Q8_0)
    data = path.read_bytes()
    norm = source.tensor("model.norm.weight").numpy().tobytes()
    assert data.count(norm) == 1
    path.write_bytes(data.replace(norm, np.full(64, 1e6, np.float32).tobytes()))
    with pytest.raises(CheckpointError, match="output_norm.weight has values that float16 cannot hold"):
        converted(path)


def test_damaged_metadata_raise_nothing_else(pico_llama: Path, tmp_path: Path) -> None:
    data = write_gguf(pico_llama, tmp_path / "pico.gguf", Kind.Q8_0).read_bytes()
    keys = [
        data.index(key) + len(key)
        for key in (
            b"llama.context_length",
            b"llama.embedding_length",
            b"llama.block_count",
            b"llama.feed_forward_length",
            b"head_count",
            b"head_count_kv",
            b"rms_epsilon",
            b"freq_base",
            b"bos_token_id",
        )
    ]
    refused = 0
    for number, at in enumerate(keys):
        for value in (0, 1, 0x7FFFFFFF, 0xFFFFFFFF):
            path = tmp_path / f"damaged-{number}-{value}.gguf"
            path.write_bytes(data[: at + 4] + value.to_bytes(4, "little") + data[at + 8 :])
            try:
                converted(path)
            except MkaError:
                refused += 1
    assert refused > 9


def texts() -> list[str]:
    """Return the tokenizer corpus, line by line and whole, and the evaluation texts."""
    corpus = (SAMPLES / "tokenizer_corpus.txt").read_text(encoding="utf-8")
    return [*corpus.splitlines(keepends=True), corpus] + [
        path.read_text(encoding="utf-8") for path in sorted((SAMPLES / "evaluation").glob("*.txt"))
    ]


@pytest.mark.real
@pytest.mark.parametrize(
    ("fixture", "prompt", "expected"),
    [("real_smollm2", "The capital of France is", "Paris"), ("real_qwen", "def add(a, b):\n    return", "a + b")],
)
def test_real_files(fixture: str, prompt: str, expected: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    path = request.getfixturevalue(fixture)
    out = tmp_path / "checkpoint"
    out.mkdir()
    gguf_to_checkpoint(path, out, QUIET)

    llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    # Not AutoTokenizer: for qwen2 it ignores the normalizer of tokenizer.json and always applies NFC.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    for text in texts():
        ids = llama.tokenize(text.encode(), add_bos=False, special=True)
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text[:80]
    assert (
        AutoTokenizer.from_pretrained(out).encode(prompt) == tokenizer.encode(prompt) == llama.tokenize(prompt.encode())
    )

    checkpoint, source = Checkpoint.open(out), read_gguf(path)
    assert len(checkpoint.shards) == len(source.tensors)
    model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    continued = model.generate(torch.tensor([tokenizer.encode(prompt)]), max_new_tokens=12, do_sample=False)
    assert expected in tokenizer.decode(continued[0])


def test_the_card_is_json_in_yaml(pico_llama: Path, tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_languages(["en", "no"])
        writer.add_description('a "quoted": text\nof two lines')

    card = gguf.Metadata.load_model_card(converted(write_gguf(pico_llama, tmp_path / "pico.gguf", change=change)))
    assert card["language"] == ["en", "no"]
    assert json.dumps(card["model_description"]) == r'"a \"quoted\": text\nof two lines"'
