"""Whole conversions: what comes out computes what went in, in both of its runtimes."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from mka_onnx import building, check, conversion, need
from mka_onnx.nbits import quantized_matrices
from mka_onnx.tokenizer import write_tokenizer
from onnx_tools import target
from pico import CHAT_TEMPLATE, make_pico
from transformers import AutoModelForCausalLM, AutoTokenizer

from mka_export.data import load_json
from mka_export.errors import ConversionError, RuntimeFailure, UnsupportedError
from mka_export.models.checkpoint import Checkpoint
from mka_export.models.onnx_file import read_graph
from mka_export.models.outline import Outline
from mka_export.models.text import sample_conversations, tokenizer_corpus
from mka_export.parity.runtimes import Prefixed, open_runtime
from mka_export.parity.runtimes.genai_runtime import GenaiRuntime
from mka_export.parity.runtimes.onnx_runtime import OnnxRuntime
from mka_export.parity.runtimes.torch_runtime import TorchRuntime
from mka_export.parity.smoke import check_chat_template
from mka_export.parity.tokenizer_check import without_misread

IDS = np.random.default_rng(11).integers(3, 640, (2, 200))  # longer than a batch of logits, and no multiple of it
RUNTIMES = [OnnxRuntime, GenaiRuntime]


@pytest.fixture(params=["pico_llama", "pico_qwen2"])
def pico(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@torch.no_grad()
def reference(folder: Path) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return torch.log_softmax(model(torch.from_numpy(IDS)).logits, dim=-1).numpy()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_float32_computes_the_same(pico, runtime, convert_to):
    found = np.stack(list(runtime(convert_to(pico, "fp32").path).log_probs(IDS)))
    np.testing.assert_allclose(found, reference(pico), atol=1e-4)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_float16_computes_the_same_on_the_cpu(pico, runtime, convert_to):
    made = convert_to(pico, "fp16")
    assert made.path.joinpath("onnx", "model_fp16.onnx").is_file()
    found, expected = np.stack(list(runtime(made.path).log_probs(IDS))), reference(pico)
    assert (np.exp(expected) * (expected - found)).sum(-1).mean() < 1e-4  # KL, nats


@pytest.mark.parametrize(
    ("model", "precision", "agreement"),
    [("pico_llama", "int8", 0.9), ("pico_llama", "int4", 0.6), ("pico_qwen2", "int8", 0.9)],
)
def test_quantized_computes_about_the_same(model, precision, agreement, request, convert_to):
    folder = request.getfixturevalue(model)
    found = np.stack(list(OnnxRuntime(convert_to(folder, precision).path).log_probs(IDS)))
    assert np.isfinite(found).all()
    assert (found.argmax(-1) == reference(folder).argmax(-1)).mean() > agreement


@torch.no_grad()
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_generation_is_that_of_transformers(runtime, pico_llama, convert_to):
    model, opened = AutoModelForCausalLM.from_pretrained(pico_llama), runtime(convert_to(pico_llama, "fp32").path)
    for prompt in (IDS[0, :9], IDS[1, :30], IDS[1, :1]):
        made = model.generate(torch.from_numpy(prompt[None]), max_new_tokens=12, do_sample=False)
        expected = [i for i in made[0, len(prompt) :].tolist() if i != 2]  # the end of a turn
        assert opened.generate([prompt.tolist()], 12) == [expected]


@torch.no_grad()
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_tokens_after_texts_that_begin_alike_are_as_likely_as_by_transformers(runtime, pico_llama, convert_to):
    model, opened = AutoModelForCausalLM.from_pretrained(pico_llama), runtime(convert_to(pico_llama, "fp32").path)
    ids = tuple(IDS.flatten().tolist())
    texts = [Prefixed(ids[:135], (ids[135:140], ids[130:170], ids[136:137])), Prefixed((), (ids[:7], ids[7:12]))]
    found = np.concatenate(list(opened.next_log_probs(texts, [5, 9])))
    rows = [torch.tensor([[*text.prefix, *rest]]) for text in texts for rest in text.rests]
    expected = torch.cat([torch.log_softmax(model(row).logits[:, -1], dim=-1)[:, [5, 9]] for row in rows])
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-3)
    rests = [(len(rest), row) for row, rest in zip(rows, (rest for t in texts for rest in t.rests), strict=True)]
    for (length, row), after in zip(rests, opened.rest_log_probs(texts), strict=True):
        np.testing.assert_allclose(after, torch.log_softmax(model(row).logits[0, -length:], dim=-1), atol=1e-3)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_token_ids_are_the_same(runtime, pico, convert_to):
    opened, tokenizer = runtime(convert_to(pico, "fp32").path), AutoTokenizer.from_pretrained(pico)
    texts, _ = without_misread(opened.name, [*tokenizer_corpus(), "<|im_start|>user\nHi", "a  1,   'b':\t\t20"])
    for text in texts:
        assert opened.tokenize(text) == tokenizer.encode(text, add_special_tokens=False), text
    assert opened.detokenize(opened.tokenize(texts[-1])) == texts[-1]


def test_digits_are_tokens_of_their_own_to_a_tokenizer_that_splits_them_off(pico_llama, convert_to):
    """onnxruntime-genai knows no other way to do so."""
    made = load_json(convert_to(pico_llama, "fp32").path / "tokenizer.json")
    given = load_json(pico_llama / "tokenizer.json")
    digits = [token for token in made["added_tokens"] if token not in given["added_tokens"]]
    assert {token["content"]: token["id"] for token in digits} == {d: given["model"]["vocab"][d] for d in "0123456789"}
    assert not any(token["special"] for token in digits)
    assert {**made, "added_tokens": given["added_tokens"]} == given


def test_without_a_tokenizer_json_the_builder_s_stays(pico_llama, tmp_path):
    """As for checkpoints that have SentencePiece's tokenizer.model alone."""
    folder, out = shutil.copytree(pico_llama, tmp_path / "pico"), tmp_path / "out"
    out.mkdir()
    shutil.move(folder / "tokenizer.json", out)
    (out / "special_tokens_map.json").write_text("{}")
    write_tokenizer(Checkpoint.open(folder), out)
    assert {path.name for path in out.iterdir()} >= {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    }
    size = (out / "tokenizer.json").stat().st_size
    assert size < (pico_llama / "tokenizer.json").stat().st_size / 2


@pytest.mark.parametrize("other", ["normalizer", "later", "prefix"])
def test_a_tokenizer_that_may_read_otherwise_by_it_keeps_its_digits(other, pico_llama, tmp_path):
    folder, out = shutil.copytree(pico_llama, tmp_path / "pico"), tmp_path / "out"
    out.mkdir()
    tokenizer = load_json(folder / "tokenizer.json")
    steps = tokenizer["pre_tokenizer"]["pretokenizers"]
    if other == "normalizer":
        tokenizer["normalizer"] = {"type": "NFC"}
    elif other == "later":
        steps.reverse()
    else:
        steps[1]["add_prefix_space"] = True
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    write_tokenizer(Checkpoint.open(folder), out)
    assert load_json(out / "tokenizer.json") == tokenizer


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-genai"])
def test_it_behaves_as_the_original(name, pico, convert_to):
    original = TorchRuntime(pico)
    with closing(open_runtime(name, convert_to(pico, "fp32").path)) as artifact:
        assert artifact.ends == original.ends == {2}
        found = check_chat_template(original, artifact, sample_conversations())
    assert found.verdict == "pass", found.reason


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (CHAT_TEMPLATE.replace("<|im_end|>", ""), "its chat template makes "),
        (None, "The artifact has no chat template"),
    ],
)
def test_a_spoilt_chat_template_is_found(template, reason, runtime, pico_llama, convert_to, tmp_path):
    folder = shutil.copytree(convert_to(pico_llama, "fp32").path, tmp_path / "folder")
    file = folder / "chat_template.jinja"
    file.unlink()
    if template:
        file.write_text(template)
    check = check_chat_template(TorchRuntime(pico_llama), runtime(folder), sample_conversations())
    assert check.verdict == "fail"
    assert reason in check.reason


def test_the_folder_is_what_every_client_looks_for(pico_llama, convert_to):
    made = convert_to(pico_llama, "int4")
    assert made.path.name == "pico-llama-int4"
    there = {path.relative_to(made.path.parent).as_posix() for path in made.path.rglob("*") if path.is_file()}
    assert there == set(made.files)
    assert {"pico-llama-int4/onnx/model_q4.onnx", "pico-llama-int4/onnx/model_q4.onnx_data"} <= there
    assert made.nbytes == sum((made.path.parent / name).stat().st_size for name in made.files)
    genai = json.loads((made.path / "genai_config.json").read_text())
    assert genai["model"]["decoder"]["filename"] == "onnx/model_q4.onnx"
    assert made.details["accuracy_level"] == 4  # as docs/onnx.md has it
    config = json.loads((made.path / "config.json").read_text())
    assert config["transformers.js_config"] == {"dtype": "q4", "use_external_data_format": True}
    where = made.path / "onnx" / "model_q4.onnx"
    graph = read_graph(where).graph
    blocks = {
        (matrix.bits, matrix.block, matrix.symmetric)
        for matrix in quantized_matrices(read_graph(where), where.parent).values()
    }
    assert blocks == {(4, 32, False), (8, 64, True)}
    used = {name for node in graph.node for name in node.input}
    assert {out for node in graph.node if node.op_type == "Constant" for out in node.output} <= used
    assert "GatherBlockQuantized" not in {node.op_type for node in graph.node}  # browsers have it on no CPU
    caches = [value for value in (*graph.input, *graph.output) if "." in value.name]
    assert caches
    width = json.loads((pico_llama / "config.json").read_text())["head_dim"]
    assert all(value.type.tensor_type.shape.dim[3].dim_value == width for value in caches)
    for name in ("tokenizer_config.json", "chat_template.jinja"):  # tokenizer.json has a test of its own
        assert (made.path / name).read_bytes() == (pico_llama / name).read_bytes()


@pytest.mark.parametrize("mixed", ["none", "head"])
def test_an_embedding_that_browsers_compute_on_webgpu_only_is_said(mixed, pico_llama, convert_to):
    said = " ".join(convert_to(pico_llama, "int4", mixed=mixed).details["warnings"])
    assert ("looked up by GatherBlockQuantized, which browsers have on WebGPU only" in said) == (mixed == "none")


@pytest.mark.parametrize(
    ("model", "precision"),
    [
        ("pico_llama", "fp32"),
        ("pico_llama", "fp16"),
        ("pico_llama", "int8"),
        ("pico_llama", "int4"),
        ("pico_qwen2", "int8"),
    ],
)
def test_size_and_cache_are_known_beforehand(model, precision, request, convert_to):
    folder = request.getfixturevalue(model)
    expected, made = (
        need(Outline.of_checkpoint(Checkpoint.open(folder)), target(precision)),
        convert_to(folder, precision),
    )
    assert made.nbytes <= expected.kept
    inputs = onnx.load(made.path / made.details["graph"], load_external_data=False).graph.input
    caches = [each.type.tensor_type for each in inputs if each.name.startswith("past_key_values.")]
    each_token = [
        np.dtype(onnx.helper.tensor_dtype_to_np_dtype(cache.elem_type)).itemsize
        * cache.shape.dim[1].dim_value
        * cache.shape.dim[3].dim_value
        for cache in caches
    ]
    assert expected.cache == sum(each_token)


@pytest.mark.parametrize(
    ("precision", "options", "message"),
    [
        ("int5", {}, "unknown precision .int5.: did you mean int8"),
        ("int4", {"blocksize": 32}, "unknown option 'blocksize': did you mean block_size"),
        ("int4", {"block_size": 33}, "block_size = 33 is not one of 16, 32"),
        ("int4", {"symmetric": "yes"}, "symmetric = 'yes' is not true or false"),
        ("int4", {"mixed": []}, r"mixed = \[\] is not one of none"),
        ("int4", {"file_stem": "../x"}, "is not a plain file name"),
    ],
)
def test_what_cannot_be_is_said(precision, options, message, pico_llama):
    with pytest.raises(ConversionError, match=message):
        check(Checkpoint.open(pico_llama), target(precision, **options))


def test_too_little_memory_is_said_before_it_starts(pico_llama, tmp_path, monkeypatch):
    free = type("Memory", (), {"available": 1000})
    monkeypatch.setattr(conversion.psutil, "virtual_memory", lambda: free)
    monkeypatch.setattr(conversion, "build", None)
    with pytest.raises(
        ConversionError, match=r"the builder holds the whole model: about .* of memory, 0.0 MB are free"
    ):
        conversion.convert(
            Checkpoint.open(pico_llama),
            target("int4"),
            tmp_path,
            tmp_path,
            activations=None,
            calibration=None,
            progress=None,
        )


def test_rows_that_the_quantizer_cannot_cut_are_said(tmp_path, pico_llama):
    odd = Checkpoint.open(make_pico(tmp_path / "odd", "llama"))  # 160 columns: five blocks of 32
    with pytest.raises(UnsupportedError, match=r"down_proj\.weight have an odd number of blocks of 32 weights"):
        check(odd, target("int4"))
    check(odd, target("int4", symmetric=True))
    check(odd, target("int8"))
    with pytest.raises(ConversionError, match="gptq needs the calibration text"):
        check(Checkpoint.open(pico_llama), replace(target("int4"), calibration=False))


def test_a_missing_builder_is_said(pico_llama, monkeypatch):
    monkeypatch.setattr(building, "find_spec", lambda name: None if name == "onnxscript" else 1)
    with pytest.raises(ConversionError, match=r"ONNX needs onnxscript, .*pip install 'mka-export\[onnx\]'"):
        check(Checkpoint.open(pico_llama), target("int4"))


@pytest.mark.parametrize("damage", [b"", b"\xff" * 50, b"{}"])
def test_a_damaged_graph_is_one_line(damage, pico_llama, convert_to, tmp_path):
    folder = shutil.copytree(convert_to(pico_llama, "fp32").path, tmp_path / "folder")
    (folder / "onnx" / "model.onnx").write_bytes(damage)
    with pytest.raises(RuntimeFailure, match=r"model\.onnx"):
        open_runtime("onnxruntime", folder)


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-genai"])
def test_it_computes_where_it_is_asked_to(name, pico_llama, convert_to):
    folder = convert_to(pico_llama, "fp32").path
    with closing(open_runtime(name, folder, device="auto")) as runtime:
        assert runtime.device == "cpu"
    with pytest.raises(RuntimeFailure, match="on cuda:7"):
        open_runtime(name, folder, device="cuda:7")
