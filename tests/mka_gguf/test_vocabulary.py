"""The tokenizer inside the file gives the ids of the checkpoint's."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from gguf import GGUFReader, TokenType
from mka_gguf.vocabulary import MERGE_ORDER, SPACES
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from mka_export.errors import ConversionError, UnsupportedError
from mka_export.models.text import tokenizer_corpus
from mka_export.models.tokenizer import load_tokenizer

# No text begins with a space and no text follows a special token: see vocabulary.SPACES.
SPM_TEXTS = (
    "Hello world, said the fox",
    "two  spaces   three, tab\tnew\n\nlines\r\n",
    "naïve café 日本語 🚀 \u200d zero width",
    "def f(x):\n    return x ** 2  # ok",
    "12345 3.14",
    "an end</s>",
)


def contents(path: Path) -> dict[str, object]:
    fields = GGUFReader(path).fields
    return {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}


def test_byte_level_bpe(pico_llama, convert_to):
    found = contents(convert_to(pico_llama, "f16").path)
    data = json.loads((pico_llama / "tokenizer.json").read_text())
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == "smollm"
    assert found["tokenizer.ggml.merges"] == [" ".join(pair) for pair in data["model"]["merges"]]
    types = found["tokenizer.ggml.token_type"]
    assert types[:3] == [TokenType.CONTROL] * 3
    assert set(types[3:]) == {TokenType.NORMAL}
    assert found["tokenizer.ggml.bos_token_id"] == 1
    assert found["tokenizer.ggml.eos_token_id"] == 2
    assert found["tokenizer.ggml.padding_token_id"] == 0
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert "im_start" in found["tokenizer.chat_template"]


def test_named_chat_templates_in_fixed_order(pico_llama, edited, convert_to):
    folder = edited(pico_llama)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    names = ["default", "tool_use", "rag"]
    config["chat_template"] = [{"name": name, "template": f"{{# {name} #}}"} for name in names]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    found = contents(convert_to(folder, "f16").path)
    assert found["tokenizer.chat_templates"] == ["rag", "tool_use"]
    assert found["tokenizer.chat_template"] == "{# default #}"
    assert found["tokenizer.chat_template.rag"] == "{# rag #}"


def with_rows(folder: Path, rows: int) -> Path:
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = torch.cat([embedding, torch.zeros(max(0, rows - len(embedding)), 64)])[:rows]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_padding_rows_become_unused_tokens(pico_llama, edited, convert_to, llama_ids):
    artifact = convert_to(with_rows(edited(pico_llama, vocab_size=672), 672), "f16")
    assert artifact.details["vocabulary"] == {"model": "gpt2", "pre": "smollm", "tokens": 640, "padding": 32}
    found = contents(artifact.path)
    assert found["tokenizer.ggml.tokens"][640:] == [f"[PAD{i}]" for i in range(640, 672)]
    assert found["tokenizer.ggml.token_type"][640:] == [TokenType.UNUSED] * 32
    text = "plain text"
    assert llama_ids(artifact.path, text) == AutoTokenizer.from_pretrained(pico_llama).encode(text)


def test_more_tokens_than_rows(pico_llama, edited, convert_to):
    with pytest.raises(ConversionError, match="ids up to 639, the embedding 600 rows"):
        convert_to(with_rows(edited(pico_llama, vocab_size=600), 600), "f16")


def test_other_kinds_of_tokenizer(pico_llama, edited, convert_to):
    folder = edited(pico_llama)
    data = json.loads((folder / "tokenizer.json").read_text())
    data["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(UnsupportedError, match="pre-tokenizer"):
        convert_to(folder, "f16")
    data["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(UnsupportedError, match="WordLevel"):
        convert_to(folder, "f16")


def test_no_tokenizer(pico_llama, edited, convert_to):
    folder = edited(pico_llama)
    for file in [*folder.glob("token*"), *folder.glob("special*")]:
        file.unlink()
    with pytest.raises(ConversionError, match="tokenizer"):
        convert_to(folder, "f16")


def one_layer(folder: Path, vocab_size: int) -> Path:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def sentencepiece_checkpoint(folder: Path, model: Path) -> Path:
    """A one-layer model with SentencePiece tokenizer ``model`` and a few padding rows."""
    one_layer(folder, sentencepiece.SentencePieceProcessor(model_file=str(model)).get_piece_size() + 8)
    shutil.copy(model, folder / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": True}))
    return folder


@pytest.fixture(scope="module")
def small_sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    prose = Path(__file__).parents[2] / "sample_prompts" / "evaluation" / "prose.txt"
    sentencepiece.SentencePieceTrainer.train(
        input=str(prose),
        model_prefix=str(folder / "small"),
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder / "small.model"


def test_sentencepiece_model(small_sentencepiece, tmp_path, convert_to, llama_ids):
    folder = sentencepiece_checkpoint(tmp_path / "spm", small_sentencepiece)
    artifact = convert_to(folder, "f16")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(small_sentencepiece))
    for text in SPM_TEXTS:
        assert llama_ids(artifact.path, text) == tokenizer.encode(text), text
    for text in ("  leading spaces", " x", *SPM_TEXTS[:-1]):  # where transformers strays from SentencePiece
        assert llama_ids(artifact.path, text)[-len(pieces.encode(text)) :] == pieces.encode(text), text
    found = contents(artifact.path)
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.token_type"][:4] == [
        TokenType.UNKNOWN,
        TokenType.CONTROL,
        TokenType.CONTROL,
        TokenType.BYTE,
    ]
    assert found["tokenizer.ggml.add_space_prefix"] is True
    assert found["tokenizer.ggml.scores"][300] == pieces.get_score(300)
    assert artifact.details["vocabulary"]["padding"] == 8
    assert SPACES in artifact.details["warnings"]


def test_sentencepiece_from_tokenizer_json(small_sentencepiece, tmp_path, convert_to, llama_ids):
    folder = sentencepiece_checkpoint(tmp_path / "spm", small_sentencepiece)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["[CUSTOM]"])
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.model").unlink(missing_ok=True)
    artifact = convert_to(folder, "f16")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in (*SPM_TEXTS, "a[CUSTOM]"):
        assert llama_ids(artifact.path, text) == tokenizer.encode(text), text
    assert contents(artifact.path)["tokenizer.ggml.token_type"][600] == TokenType.USER_DEFINED


def test_the_tokenizer_json_of_llama_2(small_sentencepiece, tmp_path, convert_to, llama_ids):
    """Its space is put in front by a normalizer, and no pre-tokenizer cuts the text."""
    folder = sentencepiece_checkpoint(tmp_path / "llama2", small_sentencepiece)
    data = json.loads(AutoTokenizer.from_pretrained(folder).backend_tokenizer.to_str())
    spaces = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]
    data |= {"normalizer": {"type": "Sequence", "normalizers": spaces}, "pre_tokenizer": None}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    artifact = convert_to(folder, "f16")
    assert contents(artifact.path)["tokenizer.ggml.add_space_prefix"] is True
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(small_sentencepiece))
    tokenizer = load_tokenizer(folder)
    for text in ("  leading spaces", " x", *SPM_TEXTS[:-1]):
        assert llama_ids(artifact.path, text) == tokenizer.encode(text) == [1, *pieces.encode(text)], text


@pytest.mark.real
def test_llama_3(tmp_path, convert_to, llama_ids):
    """Meta's own tokenizer, as tiktoken runs it, against llama.cpp on the file made from its tokenizer.json."""
    reference = pytest.importorskip("llama_models.llama3.tokenizer").Tokenizer.get_instance()
    model = Path(importlib.import_module("llama_models.llama3").__path__[0]) / "tokenizer.model"
    converter = TikTokenConverter(str(model), extra_special_tokens=list(reference.special_tokens))
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=converter.converted(), **names)
    before = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": names["bos_token"], "type_id": 0}}]}
    before["single"].append({"Sequence": {"id": "A", "type_id": 0}})
    before["pair"] = before["single"] + [{"Sequence": {"id": "B", "type_id": 0}}]
    before["special_tokens"] = {
        names["bos_token"]: {"id": names["bos_token"], "ids": [reference.bos_id], "tokens": [names["bos_token"]]}
    }
    folder = one_layer(tmp_path / "llama3", reference.n_words)
    tokenizer.save_pretrained(folder)
    data = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**data, "post_processor": before}))
    artifact = convert_to(folder, "f16")
    found = contents(artifact.path)
    assert (found["tokenizer.ggml.pre"], found["tokenizer.ggml.add_bos_token"]) == ("llama-bpe", True)
    for text in (*tokenizer_corpus(), "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"):
        expected = reference.encode(text, bos=True, eos=False, allowed_special="all")
        assert llama_ids(artifact.path, text) == expected, text


@pytest.fixture(params=["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"])
def mistral_model(request: pytest.FixtureRequest) -> Path:
    package = importlib.util.find_spec("mistral_common")
    if package is None or not package.submodule_search_locations:
        pytest.skip("mistral-common is not installed")
    return Path(package.submodule_search_locations[0]) / "data" / request.param


@pytest.mark.real
def test_mistral(mistral_model, tmp_path, convert_to, llama_ids):
    """As Mistral publishes it: tokenizer.model beside a tokenizer.json whose merges are in the scores' order."""
    folder = sentencepiece_checkpoint(tmp_path / "mistral", mistral_model)
    assert MERGE_ORDER in convert_to(folder, "f16").details["warnings"]  # transformers orders them by id
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(mistral_model))
    data = json.loads(AutoTokenizer.from_pretrained(folder).backend_tokenizer.to_str())
    data["model"]["merges"].sort(key=lambda pair: -pieces.get_score(pieces.piece_to_id("".join(pair))))
    (folder / "tokenizer.json").write_text(json.dumps(data))
    artifact = convert_to(folder, "f16")
    assert MERGE_ORDER not in artifact.details["warnings"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in SPM_TEXTS:
        assert llama_ids(artifact.path, text) == tokenizer.encode(text), text
