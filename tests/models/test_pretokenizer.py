"""The table of pre-tokenizers: both ways, against llama.cpp itself, and against tokenizers as models ship them."""

from __future__ import annotations

import importlib.util
import json
import unicodedata
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from mka_export.errors import UnsupportedError
from mka_export.models.pretokenizer import PreTokenizer, identify, pre_tokenizer

NAMES = ["gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "tekken", "default"]
SAMPLES = Path(__file__).parents[2] / "sample_prompts"


def corpus() -> list[str]:
    """Return the awkward lines of the tokenizer corpus, and the whole of it."""
    text = (SAMPLES / "tokenizer_corpus.txt").read_text(encoding="utf-8")
    return [
        *text.splitlines(keepends=True),
        text,
        "it'S 'LL we'Re 12345 ½Ⅻ x1234567y\r\n\r\n  \n\n \t z  ",
        "a\u00a0\u3000b'd//\n/",
    ]


@pytest.fixture(scope="module")
def vocabulary() -> dict[str, Any]:
    """Train a BPE whose tokens cross every boundary, so that a different cut gives different ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=3000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), max_token_length=8, show_progress=False
    )
    tokenizer.train_from_iterator([line[i : i + 40] for line in corpus() * 3 for i in range(0, 400, 40)], trainer)
    parsed = json.loads(tokenizer.to_str())
    model: dict[str, Any] = parsed["model"]
    model["vocab"]["ĠSCREAMING"] = len(model["vocab"])  # no merge leads here: only ignore_merges finds it
    return model


def write_vocabulary(path: Path, name: str, model: dict[str, Any]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    vocab = model["vocab"]
    writer.add_token_list(sorted(vocab, key=vocab.__getitem__))
    writer.add_token_types([gguf.TokenType.NORMAL] * len(vocab))
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rebuilt(entry: PreTokenizer, model: dict[str, Any]) -> dict[str, Any]:
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": entry.json(),
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {**model, "ignore_merges": entry.ignore_merges},
    }


def differing(path: Path, tokenizer: Tokenizer) -> list[str]:
    """Return the texts of the corpus to which llama.cpp gives other ids."""
    llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    return [
        text
        for text in corpus()
        if llama.tokenize(text.encode(), add_bos=False, special=True)
        != tokenizer.encode(text, add_special_tokens=False).ids
    ]


@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_gives_the_same_ids(name: str, vocabulary: dict[str, Any], tmp_path: Path) -> None:
    write_vocabulary(tmp_path / "vocab.gguf", name, vocabulary)
    texts = differing(tmp_path / "vocab.gguf", Tokenizer.from_str(json.dumps(rebuilt(pre_tokenizer(name), vocabulary))))
    if name == "tekken":  # llama.cpp's engine has no \p{M}; its own expression leaves marks out of words
        texts = [text for text in texts if not any(unicodedata.category(c)[0] == "M" for c in text)]
    assert texts == []


def test_the_corpus_tells_the_names_apart(vocabulary: dict[str, Any]) -> None:
    ids = set()
    for name in NAMES:
        tokenizer = Tokenizer.from_str(json.dumps(rebuilt(pre_tokenizer(name), vocabulary)))
        ids.add(str([tokenizer.encode(text).ids for text in corpus()]))
    assert len(ids) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_rebuilt_is_identified(name: str) -> None:
    entry = pre_tokenizer(name)
    assert identify(rebuilt(entry, {"type": "BPE"})) == name
    assert all(pre_tokenizer(alias) is entry for alias in entry.aliases)


def test_fields_that_change_no_ids_do_not_matter() -> None:
    found = identify(
        {
            "model": {"ignore_merges": True},
            "post_processor": {"type": "ByteLevel"},
            "normalizer": {"type": "Sequence", "normalizers": []},
            "pre_tokenizer": {
                "pretokenizers": [
                    {
                        "invert": False,
                        "behavior": "Isolated",
                        "pattern": {"Regex": pre_tokenizer("llama3").splits[0]},
                        "type": "Split",
                    },
                    {"use_regex": False, "trim_offsets": False, "add_prefix_space": False, "type": "ByteLevel"},
                ],
                "type": "Sequence",
            },
        }
    )
    assert found == "llama-bpe"


def saved(tokenizer: Tokenizer) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(tokenizer.to_str())
    return parsed


def test_identifies_what_the_tokenizers_library_saves() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert identify(saved(tokenizer)) == "gpt-2"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert identify(saved(tokenizer)) == "smollm"


def test_identifies_the_tokenizer_class_of_qwen2() -> None:
    from transformers import Qwen2Tokenizer

    assert identify(saved(Qwen2Tokenizer().backend_tokenizer)) == "qwen2"


@pytest.mark.parametrize("step", [pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.Metaspace()])
def test_refuses_what_llama_cpp_does_not_do(step: Any) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = step
    with pytest.raises(UnsupportedError, match="unknown pre-tokenizer"):
        identify(saved(tokenizer))


def test_refuses_an_unknown_expression_by_name() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("[a-z]{7}"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(UnsupportedError, match=r"\[a-z\]\{7\}, gpt2"):
        identify(saved(tokenizer))


def test_refuses_a_normalizer_that_llama_cpp_leaves_out() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(UnsupportedError, match="Lowercase"):
        identify(saved(tokenizer))


def test_refuses_an_unknown_name_with_the_nearest() -> None:
    with pytest.raises(UnsupportedError, match="did you mean smollm"):
        pre_tokenizer("smolm")


def package_file(package: str, *parts: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    return Path(spec.submodule_search_locations[0], *parts)


def test_the_expression_of_llama_3_is_the_authors_own() -> None:
    source = package_file("llama_models", "llama3", "tokenizer.py").read_text(encoding="utf-8")
    assert f'r"{pre_tokenizer("llama-bpe").splits[0]}"' in source


def test_the_expression_of_tekken_is_the_authors_own() -> None:
    tekken = json.loads(package_file("mistral_common", "data", "tekken_240911.json").read_text(encoding="utf-8"))
    assert tekken["config"]["pattern"] == pre_tokenizer("tekken").splits[0]
