"""Tokenizers rebuilt from GGUF files give the ids that llama.cpp gives."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import pytest
import sentencepiece
from gguf import TokenType
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from mka_export.errors import CheckpointError, UnsupportedError
from mka_export.models.gguf_file import read_gguf
from mka_export.models.gguf_tokenizer import write_tokenizer
from mka_export.publish import write_json

SAMPLES = Path(__file__).parents[2] / "sample_prompts"
Pieces = sentencepiece.SentencePieceProcessor
ODD = [
    "",
    " ",
    "  two",
    "a<s> b</s>  c <unk> d",
    "aaaaaaaaaaaaa",
    " " * 50 + "x" + " " * 37,
    "=" * 31 + "\n\n\n",
    "<|tool|>x<|tool|> y",
]


def texts() -> list[str]:
    corpus = (SAMPLES / "tokenizer_corpus.txt").read_text(encoding="utf-8")
    return [
        *corpus.splitlines(keepends=True),
        corpus,
        (SAMPLES / "evaluation" / "prose.txt").read_text(encoding="utf-8"),
        *ODD,
    ]


@pytest.fixture(scope="module")
def pieces() -> Pieces:
    """Train a SentencePiece BPE with byte fallback, spaces and digits treated as Llama 2 does."""
    lines = (SAMPLES / "evaluation" / "prose.txt").read_text(encoding="utf-8")[:60_000].splitlines()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=900,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.995,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["<|tool|>"],
        minloglevel=2,
    )
    return Pieces(model_proto=model.getvalue())


def piece_type(pieces: Pieces, token: int) -> TokenType:
    for kind, test in (
        (TokenType.UNKNOWN, pieces.is_unknown),
        (TokenType.CONTROL, pieces.is_control),
        (TokenType.UNUSED, pieces.is_unused),
        (TokenType.BYTE, pieces.is_byte),
    ):
        if test(token):
            return kind
    return TokenType.USER_DEFINED if pieces.id_to_piece(token) == "<|tool|>" else TokenType.NORMAL


def write_vocabulary(pieces: Pieces, path: Path, change: Callable[[gguf.GGUFWriter], None] | None = None) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    size = pieces.get_piece_size()
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([pieces.id_to_piece(i) for i in range(size)])
    writer.add_token_scores([pieces.get_score(i) for i in range(size)])
    writer.add_token_types([piece_type(pieces, i) for i in range(size)])
    if change:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rebuilt(path: Path) -> Path:
    out = path.with_suffix("")
    out.mkdir()
    write_tokenizer(read_gguf(path), out, 4096)
    write_json(out / "config.json", {"model_type": "llama"})
    return out


def assert_same_ids(path: Path, folder: Path) -> None:
    llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in texts():
        expected = llama.tokenize(text.encode(), add_bos=False, special=True)
        assert tokenizer.encode(text, add_special_tokens=False) == expected, text[:60]
        assert plain.encode(text, add_special_tokens=False).ids == expected
    assert tokenizer.encode("Hi there") == plain.encode("Hi there").ids == llama.tokenize(b"Hi there", add_bos=True)


def no_prefix(writer: gguf.GGUFWriter) -> None:
    writer.add_add_space_prefix(False)


def no_bos(writer: gguf.GGUFWriter) -> None:
    writer.add_add_bos_token(False)


@pytest.mark.parametrize("change", [None, no_prefix, no_bos])
def test_sentencepiece_gives_the_ids_of_llama_cpp(change: Any, pieces: Pieces, tmp_path: Path) -> None:
    path = write_vocabulary(pieces, tmp_path / "vocab.gguf", change)
    assert_same_ids(path, rebuilt(path))


def test_sentencepiece_decodes_to_the_text(pieces: Pieces, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(rebuilt(write_vocabulary(pieces, tmp_path / "vocab.gguf")))
    for text in ("Hello,  wörld 龘\n", "def f(x):\n\treturn x  # 🙂"):
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_sentencepiece_itself_reads_the_model(pieces: Pieces, tmp_path: Path) -> None:
    folder = rebuilt(write_vocabulary(pieces, tmp_path / "vocab.gguf"))
    again = Pieces(model_file=str(folder / "tokenizer.model"))
    assert [again.get_score(i) for i in range(900)] == [pieces.get_score(i) for i in range(900)]
    assert (again.bos_id(), again.eos_id(), again.unk_id(), again.pad_id()) == (1, 2, 0, -1)
    for text in texts():
        assert again.encode(text) == pieces.encode(text)


@pytest.mark.parametrize("name", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"])
def test_mistral_gives_the_ids_of_llama_cpp(name: str, tmp_path: Path) -> None:
    spec = importlib.util.find_spec("mistral_common")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("mistral_common is not installed")
    mistral = Pieces(model_file=str(Path(spec.submodule_search_locations[0], "data", name)))
    path = write_vocabulary(mistral, tmp_path / "vocab.gguf")
    assert_same_ids(path, rebuilt(path))


def byte_level(path: Path, tokens: list[str], types: list[TokenType], merges: list[str], **ids: int) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    for name, token in ids.items():
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_chat_template("default one")
    writer.add_array("tokenizer.chat_templates", ["tool_use"])
    writer.add_string("tokenizer.chat_template.tool_use", "another")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_the_file_does_not_say_is_as_in_llama_cpp(tmp_path: Path) -> None:
    """Llama 3's pre-tokenizer brings a BOS; </s> ends a text whatever its type; [PADn] only fills the embedding."""
    tokens = ["a", "b", "<bos>", "</s>", "ab", "<x>", "[PAD6]", "[PAD7]"]
    normal, unused = TokenType.NORMAL, TokenType.UNUSED
    types = [normal, normal, TokenType.CONTROL, normal, normal, TokenType.USER_DEFINED, unused, unused]
    path = byte_level(tmp_path / "vocab.gguf", tokens, types, ["a b"], bos=2, eos=3, pad=77, eot=4)
    out = rebuilt(path)
    tokenizer = AutoTokenizer.from_pretrained(out)
    llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    assert tokenizer.encode("ab</s>b<x>a") == llama.tokenize(b"ab</s>b<x>a", special=True) == [2, 4, 3, 1, 5, 0]
    assert len(tokenizer) == 6
    assert tokenizer.pad_token is None
    assert tokenizer.decode([4, 5, 3], skip_special_tokens=True) == "ab<x>"
    assert tokenizer.chat_template == {"default": "default one", "tool_use": "another"}
    assert write_tokenizer(read_gguf(path), out, 8).ends == [3, 4]


def test_parts_that_contradict_each_other_are_refused(pieces: Pieces, tmp_path: Path) -> None:
    normal = [TokenType.NORMAL] * 3
    bad = {
        "twice": (byte_level(tmp_path / "a.gguf", ["a", "b", "b"], normal, []), CheckpointError, "2 different"),
        "types": (byte_level(tmp_path / "b.gguf", ["a", "b"], normal, []), CheckpointError, "3 token types"),
        "merge": (byte_level(tmp_path / "c.gguf", ["a", "b", "c"], normal, ["a b"]), CheckpointError, "merge 'a b'"),
        "blank": (byte_level(tmp_path / "d.gguf", ["a", "b", "c"], normal, ["ab"]), CheckpointError, "merge 'ab'"),
        "spaces": (
            write_vocabulary(pieces, tmp_path / "e.gguf", lambda w: w.add_remove_extra_whitespaces(True)),
            UnsupportedError,
            "removes white space",
        ),
    }
    for path, error, message in bad.values():
        with pytest.raises(error, match=message):
            rebuilt(path)
