"""Whole conversions: what comes out computes what went in."""

from __future__ import annotations

import weakref
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from mka_gguf.settings import PRECISIONS, read_settings
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig

from mka_export.errors import ConversionError
from mka_export.models.activations import Activations
from mka_export.models.checkpoint import Checkpoint
from mka_export.target import load_target, target_names

IDS = np.random.default_rng(11).integers(3, 640, 120).tolist()
FAMILIES = ("pico_llama", "pico_qwen2")
TEXTS = (
    "The quick brown fox, 12345 times.",
    "def f(x):\n\treturn x ** 2  # square\n\n\n",
    "naïve café — 日本語 🚀 \u200d zero width",
    "<|im_start|>user\nHi<|im_end|>\n",
    "   leading and trailing   ",
)


@pytest.fixture(params=FAMILIES)
def pico(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def activations_of(folder: Path, seed: int = 0) -> Activations:
    """Made-up column statistics that weigh columns very differently."""
    checkpoint = Checkpoint.open(folder)
    generator = torch.Generator().manual_seed(seed)
    names = [n for n in checkpoint.shards if n.endswith("proj.weight")]
    squares = {n: torch.rand(checkpoint.shapes[n][1], generator=generator) ** 4 for n in names}
    return Activations(squares, tokens=100, calibration="0" * 64)


@pytest.mark.parametrize(("precision", "tolerance"), [("f32", 1e-4), ("f16", 5e-2), ("bf16", 4e-1)])
def test_unquantized_computes_the_same(pico, precision, tolerance, convert_to, logprobs):
    artifact = convert_to(pico, precision)
    ours, reference = logprobs(artifact.path, pico, IDS)
    assert np.abs(ours - reference).max() < tolerance


@pytest.mark.parametrize("precision", [name for name, p in PRECISIONS.items() if p.quantized])
def test_every_quantized_precision_runs(pico, precision, convert_to, logprobs):
    artifact = convert_to(pico, precision)
    ours, reference = logprobs(artifact.path, pico, IDS)
    assert np.isfinite(ours).all()
    agreement = (ours.argmax(1) == reference.argmax(1)).mean()
    assert agreement > (0.95 if precision == "q8_0" else 0.6)
    reader = GGUFReader(artifact.path)
    assert reader.fields["general.file_type"].contents() == int(PRECISIONS[precision].file_type)
    assert artifact.details["types"]["F32"] == sum(t.tensor_type.name == "F32" for t in reader.tensors)


def test_token_ids_are_the_same(pico, convert_to, llama_ids):
    artifact = convert_to(pico, "f16")
    tokenizer = AutoTokenizer.from_pretrained(pico)
    for text in TEXTS:
        assert llama_ids(artifact.path, text) == tokenizer.encode(text), text


def test_artifact_is_one_named_file(pico_llama, convert_to):
    artifact = convert_to(pico_llama, "q4_k_m")
    assert artifact.path.name == "pico-llama-Q4_K_M.gguf"
    assert [p.name for p in artifact.path.parent.iterdir()] == list(artifact.files) == [artifact.path.name]
    assert artifact.nbytes == artifact.path.stat().st_size
    assert convert_to(pico_llama, "f16", file_stem="short").path.name == "short-F16.gguf"


@pytest.mark.parametrize("precision", ["f16", "q4_k_m"])
def test_same_input_same_bytes(pico_llama, precision, convert_to):
    activations = activations_of(pico_llama)
    first, second = (convert_to(pico_llama, precision, activations).path.read_bytes() for _ in range(2))
    assert first == second


def test_imatrix_changes_the_bytes(pico_llama, convert_to):
    plain = convert_to(pico_llama, "q4_k_m")
    guided = convert_to(pico_llama, "q4_k_m", activations_of(pico_llama))
    refused = convert_to(pico_llama, "q4_k_m", activations_of(pico_llama), imatrix=False)
    assert (plain.details["imatrix_tensors"], guided.details["imatrix_tensors"]) == (0, 42)
    weights = [{t.name: bytes(t.data) for t in GGUFReader(a.path).tensors} for a in (plain, guided)]
    changed = {name for name in weights[0] if weights[0][name] != weights[1][name]}
    assert {"blk.0.attn_q.weight", "blk.1.ffn_down.weight"} <= changed
    assert not {"token_embd.weight", "output_norm.weight"} & changed
    assert refused.path.read_bytes() == plain.path.read_bytes()


def test_imatrix_is_for_few_bits_unless_asked(pico_llama, convert_to):
    activations = activations_of(pico_llama)
    assert convert_to(pico_llama, "q5_k_m", activations).details["imatrix_tensors"] == 0
    assert convert_to(pico_llama, "q5_k_m", activations, imatrix=True).details["imatrix_tensors"] == 42


def test_imatrix_helps_the_columns_that_matter(pico_llama, convert_to):
    """The error weighed by the statistics goes down: they reach the right tensor, in the right column order."""
    activations = activations_of(pico_llama)
    error = {}
    for guided in (False, True):
        artifact = convert_to(pico_llama, "q4_0", activations, imatrix=guided)
        tensors = {t.name: t for t in GGUFReader(artifact.path).tensors}
        stored = tensors["blk.2.ffn_up.weight"]
        values = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy())
        original = Checkpoint.open(pico_llama).tensor(name := "model.layers.2.mlp.up_proj.weight")
        error[guided] = float((((values - original) ** 2) * activations.mean_square[name]).sum())
    assert error[True] < 0.9 * error[False]


def test_tied_head_statistics_go_to_the_embedding(pico_llama, convert_to):
    activations = activations_of(pico_llama)
    with_head = {**activations.mean_square, "lm_head.weight": torch.linspace(0, 4, 64) ** 4}
    artifact = convert_to(pico_llama, "q4_k_m", Activations(with_head, 100, "0" * 64))
    assert artifact.details["imatrix_tensors"] == 43


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("model.layers.9.mlp.up_proj.weight", torch.ones(64), "no such matrix"),
        ("model.layers.0.mlp.up_proj.weight", torch.ones(65), "65 columns"),
        ("model.layers.0.mlp.up_proj.weight", torch.full((64,), torch.nan), "NaN"),
    ],
)
def test_foreign_statistics_are_refused(pico_llama, name, values, words, convert_to):
    with pytest.raises(ConversionError, match=words):
        convert_to(pico_llama, "q4_k_m", Activations({name: values}, 1, "0" * 64))


def test_fallbacks_are_counted_and_limited(pico_llama, convert_to):
    details = convert_to(pico_llama, "q4_k_m").details
    assert details["fallback_types"] == {"Q5_0": 38, "Q8_0": 5}  # 64 and 160 columns: 256 divides neither
    assert (details["fallback_tensors"], details["fallback_share"]) == (43, 1.0)
    assert details["warnings"] == ["100% of the weights fell back to other types: 38 Q5_0, 5 Q8_0"]
    assert convert_to(pico_llama, "q8_0", max_fallback=0.0).details["fallback_tensors"] == 0
    with pytest.raises(ConversionError, match=r"100% of the weights fell back.*max_fallback = 50%"):
        convert_to(pico_llama, "q4_k_m", max_fallback=0.5)


def test_share_of_fallbacks_is_by_weights(random_model, convert_to):
    config = LlamaConfig(
        vocab_size=640,
        hidden_size=256,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    artifact = convert_to(random_model(config, torch.bfloat16), "q4_k_m")
    assert artifact.details["fallback_tensors"] == 1  # ffn_down alone has 96 columns
    down, rest = 256 * 96, 640 * 256 + 4 * 256 * 256 + 2 * 96 * 256
    assert artifact.details["fallback_share"] == pytest.approx(down / (down + rest))
    assert artifact.details["types"]["Q4_K"] > 0


def test_rows_that_fit_no_block_become_f16(random_model, convert_to, logprobs):
    config = LlamaConfig(
        vocab_size=640, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=2
    )
    folder = random_model(config)
    artifact = convert_to(folder, "q4_0")
    assert set(artifact.details["fallback_types"]) == {"F16"}
    ours, reference = logprobs(artifact.path, folder, IDS)
    assert np.abs(ours - reference).max() < 0.1


def test_one_tensor_in_memory_at_a_time(pico_llama, convert_to, monkeypatch):
    live: weakref.WeakSet[Tensor] = weakref.WeakSet()
    read, peak = Checkpoint.tensor, 0

    def tensor(self: Checkpoint, name: str) -> Tensor:
        nonlocal peak
        result = read(self, name)
        live.add(result)
        peak = max(peak, sum(t.nbytes for t in live))
        return result

    monkeypatch.setattr(Checkpoint, "tensor", tensor)
    for precision in ("f32", "f16", "q4_k_m"):
        convert_to(pico_llama, precision)
    checkpoint = Checkpoint.open(pico_llama)
    largest = checkpoint.tensor("model.embed_tokens.weight").nbytes
    assert largest <= peak <= 2 * largest < checkpoint.nbytes / 3


def test_tensors_equal_the_checkpoint(pico_qwen2, convert_to):
    """Stock order (qwen2 permutes nothing): names and values one by one."""
    checkpoint = Checkpoint.open(pico_qwen2)
    tensors = {t.name: t for t in GGUFReader(convert_to(pico_qwen2, "f32").path).tensors}
    assert len(tensors) == len(checkpoint.shards)
    for ours, name in (
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output.weight", "lm_head.weight"),
        ("blk.3.attn_q.bias", "model.layers.3.self_attn.q_proj.bias"),
        ("blk.5.ffn_down.weight", "model.layers.5.mlp.down_proj.weight"),
    ):
        assert np.array_equal(tensors[ours].data, checkpoint.tensor(name).numpy())


def with_value(folder: Path, name: str, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[5] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("precision", ["f16", "q4_k_m"])
def test_damaged_weights_are_named(pico_llama, precision, value, edited, convert_to):
    folder = edited(pico_llama)
    with_value(folder, name := "model.layers.1.mlp.up_proj.weight", value)
    with pytest.raises(ConversionError, match=f"{name} holds NaN or infinity"):
        convert_to(folder, precision)


def test_value_too_large_for_f16(pico_llama, edited, convert_to):
    folder = edited(pico_llama)
    with_value(folder, "model.layers.1.mlp.up_proj.weight", 70000.0)
    with pytest.raises(ConversionError, match=r"reaches 70000, more than F16 can hold\. Use the precision bf16"):
        convert_to(folder, "f16")
    assert convert_to(folder, "bf16").nbytes


def test_failed_quantization_leaves_nothing_behind(pico_llama, convert_to, tmp_path, monkeypatch):
    monkeypatch.setattr("mka_gguf.quantizer.BUFFER_BYTES", 1)
    monkeypatch.setattr("mka_gguf.conversion.write", lambda _writer, path, *_: path.write_bytes(b"not a GGUF file"))
    with pytest.raises(ConversionError, match="llama.cpp cannot quantize to MOSTLY_Q4_K_M"):
        convert_to(pico_llama, "q4_k_m")
    assert not [*tmp_path.glob("out-*/*"), *tmp_path.rglob("*.gguf")]


def test_full_disk_is_a_plain_error(pico_llama, convert_to, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mka_gguf.conversion.write", full)
    with pytest.raises(ConversionError, match="No space left on device"):
        convert_to(pico_llama, "f16")


def test_the_library_is_silent(pico_llama, convert_to, capfd):
    convert_to(pico_llama, "q4_k_m")
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize(
    ("precision", "options", "words"),
    [
        ("q4_k_n", {}, "did you mean q4_k_m"),
        ("q4_k_m", {"imatrics": True}, "did you mean imatrix"),
        ("q4_k_m", {"imatrix": "none"}, "is not true or false"),
        ("q4_k_m", {"max_fallback": 1.5}, "is not a share from 0 to 1"),
        ("q4_k_m", {"file_stem": "../escape"}, "is not a plain file name"),
    ],
)
def test_wrong_settings(pico_llama, precision, options, words, convert_to):
    with pytest.raises(ConversionError, match=words):
        convert_to(pico_llama, precision, **options)


def test_shipped_targets():
    names = [name for name in target_names() if name.startswith("gguf-")]
    assert {"gguf-f16", "gguf-q8", "gguf-q6", "gguf-q5", "gguf-q4", "gguf-q3"} <= set(names)
    for name in names:
        target = load_target(name)
        precision, _ = read_settings(target)
        assert (target.converter, target.runtime) == ("gguf", "llama.cpp")
        assert target.activations == precision.imatrix
        assert target.conversion.max_mean_kl
        assert target.compression.max_ppl_ratio == 1.35
