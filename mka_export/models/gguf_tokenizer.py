"""Rebuild the tokenizer of a GGUF file as Hugging Face files, so that its ids are those of llama.cpp.

llama.cpp's rules are those of ``src/llama-vocab.cpp``: which tokens are looked for in the text before
anything else, where a space is put in front, and what holds where the file is silent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import TokenType
from sentencepiece import sentencepiece_model_pb2
from transformers.tokenization_utils_base import generate_merges

from mka_export.errors import CheckpointError, UnsupportedError
from mka_export.models.gguf_file import GGUFFile
from mka_export.models.pretokenizer import pre_tokenizer
from mka_export.publish import write_json

PREFIX = "tokenizer.ggml."
SPACE = "▁"
MAX_TOKEN = 1024  # characters; all splits of a token are tried for merges, and real ones have up to 128 or so
DEFAULT_IDS = {"llama": {"bos": 1, "eos": 2, "unk": 0}}  # of llama.cpp, by tokenizer.ggml.model
ID_KEYS = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Whatever the file says of them, llama.cpp takes these for control tokens (its list of ends of generation).
ENDS = frozenset(
    [
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "<｜end▁of▁sentence｜>",
    ]
)
ATOMIC = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)  # looked for in the text before all else


@dataclass(frozen=True)
class Tokens:
    """The vocabulary of a GGUF file, without the tokens that only fill up the embedding.

    Attributes:
        texts: one a token, as the file spells it.
        types: one a token.
        special: ``bos``, ``eos``, ``unk``, ``pad`` -> id, where there is one.
        ends: the ids that end a generation.
    """

    texts: Sequence[str]
    types: Sequence[TokenType]
    special: dict[str, int]
    ends: Sequence[int]

    @property
    def ids(self) -> dict[str, int]:
        """Text -> id."""
        return {text: token for token, text in enumerate(self.texts)}


def write_tokenizer(file: GGUFFile, out: Path, context: int) -> Tokens:
    """Write tokenizer.json and tokenizer_config.json, and for SentencePiece tokenizer.model, to folder ``out``.

    Text becomes the same ids as in llama.cpp. So no normalizer is written where llama.cpp has none: the
    NFC of Qwen's own tokenizer.json is lost in a GGUF file.

    Args:
        file: the GGUF file.
        out: an existing folder.
        context: the longest text, in tokens.

    Raises:
        UnsupportedError: the tokenizer, or its pre-tokenizer, is of a kind we do not rebuild.
        CheckpointError: its parts contradict each other.
    """
    model = file.get(PREFIX + "model", str)
    if model not in ("gpt2", "llama"):
        raise UnsupportedError(
            f"{file.path} has a tokenizer of kind {model!r}",
            "Byte-level BPE (gpt2) and SentencePiece (llama) are read.",
        )
    tokens = _tokens(file, model)
    entry = pre_tokenizer(file.find(PREFIX + "pre", str) or "default") if model == "gpt2" else None
    add_bos = file.find(PREFIX + "add_bos_token", bool)
    add_eos = file.find(PREFIX + "add_eos_token", bool) or False
    if add_bos is None:
        add_bos = entry is None or entry.adds_bos
    add_bos, add_eos = add_bos and "bos" in tokens.special, add_eos and "eos" in tokens.special
    if entry is not None:
        parts = _byte_level(file, tokens)
        parts["pre_tokenizer"] = entry.json()
        parts["model"]["ignore_merges"] = entry.ignore_merges
    else:
        parts = _sentencepiece(file, tokens, out)
    around = (tokens.special["bos"] if add_bos else None, tokens.special["eos"] if add_eos else None)
    write_json(
        out / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [_added(token, tokens) for token, kind in enumerate(tokens.types) if kind in ATOMIC],
            "post_processor": _post_processor(tokens, *around),
            **parts,
        },
    )
    write_json(out / "tokenizer_config.json", _config(file, tokens, context, add_bos, add_eos))
    return tokens


def _tokens(file: GGUFFile, model: str) -> Tokens:
    texts = file.list_of(PREFIX + "tokens", str)
    numbers = file.list_of(PREFIX + "token_type", int) or [int(TokenType.NORMAL)] * len(texts)
    if not texts or len(numbers) != len(texts) or len(set(texts)) != len(texts):
        raise CheckpointError(
            f"{file.path}: {len(texts)} tokens ({len(set(texts))} different) and {len(numbers)} token types do not fit",
            "Fetch the file again.",
        )
    if strange := set(numbers) - {int(kind) for kind in TokenType}:
        raise CheckpointError(f"{file.path}: unknown token types {sorted(strange)}", "Fetch the file again.")
    if (longest := max(map(len, texts))) > MAX_TOKEN:
        raise CheckpointError(f"{file.path} has a token of {longest} characters", "Fetch the file again.")
    count = len(texts)
    while count and numbers[count - 1] == TokenType.UNUSED and texts[count - 1] == f"[PAD{count - 1}]":
        count -= 1  # llama.cpp's names for embedding rows that have no token
    special = dict(DEFAULT_IDS.get(model, {}))
    for kind, key in ID_KEYS.items():
        if (token := file.find(PREFIX + key, int)) is not None:
            special[kind] = token
    ends = [file.find(PREFIX + key, int) for key in END_KEYS]
    if special.get("eos") not in ends:
        ends.insert(0, special.get("eos"))
    return Tokens(
        texts[:count],
        [
            TokenType.CONTROL if text in ENDS else TokenType(number)
            for text, number in zip(texts[:count], numbers[:count], strict=True)
        ],
        {kind: token for kind, token in special.items() if 0 <= token < count},
        list(dict.fromkeys(token for token in ends if token is not None and 0 <= token < count)),
    )


def _byte_level(file: GGUFFile, tokens: Tokens) -> dict[str, Any]:
    ids = tokens.ids
    merges = []
    for merge in file.list_of(PREFIX + "merges", str):
        split = merge.find(" ", 1)  # a token may begin with a space
        left, right = merge[:split], merge[split + 1 :]
        if split < 0 or left not in ids or right not in ids or left + right not in ids:
            raise CheckpointError(f"{file.path}: the merge {merge!r} is not one of tokens", "Fetch the file again.")
        merges.append([left, right])
    return {
        "normalizer": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(ids, merges, unknown=None, byte_fallback=False),
    }


def _sentencepiece(file: GGUFFile, tokens: Tokens, out: Path) -> dict[str, Any]:
    scores = file.list_of(PREFIX + "scores", float)[: len(tokens.texts)]
    if len(scores) != len(tokens.texts):
        raise CheckpointError(
            f"{file.path}: {len(scores)} scores for {len(tokens.texts)} tokens", "Fetch the file again."
        )
    if file.find(PREFIX + "remove_extra_whitespaces", bool):
        raise UnsupportedError(
            f"{file.path} has a tokenizer that removes white space", "Use the model it was made from."
        )
    prefix = file.find(PREFIX + "add_space_prefix", bool)
    prefix = True if prefix is None else prefix
    _write_sentencepiece(tokens, scores, prefix, out / "tokenizer.model")
    # llama.cpp puts the space before the text and after every special token: so does a normalizer, which
    # sees each stretch between added tokens by itself.
    spaces: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        spaces.insert(0, {"type": "Prepend", "prepend": SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    ids = tokens.ids
    merges = generate_merges(ids, dict(zip(tokens.texts, scores, strict=True)))
    unknown = tokens.texts[tokens.special["unk"]] if "unk" in tokens.special else None
    return {
        "normalizer": {"type": "Sequence", "normalizers": spaces},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(ids, [list(pair) for pair in merges], unknown=unknown, byte_fallback=True),
    }


def _bpe(vocab: dict[str, int], merges: list[list[str]], *, unknown: str | None, byte_fallback: bool) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": byte_fallback,
        "byte_fallback": byte_fallback,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges,
    }


def _write_sentencepiece(tokens: Tokens, scores: Sequence[float], prefix: bool, path: Path) -> None:
    """Write tokenizer.model, which alone keeps the scores that llama.cpp merges by."""
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at run time
    for text, score, kind in zip(tokens.texts, scores, tokens.types, strict=True):
        model.pieces.add(piece=text.replace(" ", SPACE), score=score, type=int(kind))  # the numbers of the types agree
    trainer = model.trainer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(tokens.texts)
    trainer.byte_fallback = TokenType.BYTE in tokens.types
    for name in ("unk", "bos", "eos", "pad"):
        token = tokens.special.get(name, -1)
        setattr(trainer, f"{name}_id", token)
        if token >= 0:
            setattr(trainer, f"{name}_piece", tokens.texts[token])
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = prefix
    model.normalizer_spec.remove_extra_whitespaces = False
    path.write_bytes(model.SerializeToString(deterministic=True))


def _added(token: int, tokens: Tokens) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = tokens.types[token] != TokenType.USER_DEFINED
    return {"id": token, "content": tokens.texts[token], **flags, "special": special}


def _post_processor(tokens: Tokens, bos: int | None, eos: int | None) -> dict[str, Any] | None:
    """Put BOS and EOS around a text, where the file asks for it."""
    around = [token for token in (bos, eos) if token is not None]
    if not around:
        return None

    def template(*sequences: str) -> list[dict[str, Any]]:
        steps: list[dict[str, Any]] = []
        for type_id, sequence in enumerate(sequences):
            if bos is not None:
                steps.append({"SpecialToken": {"id": tokens.texts[bos], "type_id": type_id}})
            steps.append({"Sequence": {"id": sequence, "type_id": type_id}})
            if eos is not None:
                steps.append({"SpecialToken": {"id": tokens.texts[eos], "type_id": type_id}})
        return steps

    named = {tokens.texts[t]: {"id": tokens.texts[t], "ids": [t], "tokens": [tokens.texts[t]]} for t in around}
    return {"type": "TemplateProcessing", "single": template("A"), "pair": template("A", "B"), "special_tokens": named}


def _config(file: GGUFFile, tokens: Tokens, context: int, add_bos: bool, add_eos: bool) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is, whatever the family
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "model_input_names": ["input_ids", "attention_mask"],
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
        **{f"{kind}_token": tokens.texts[token] for kind, token in tokens.special.items()},
    }
    if templates := _chat_templates(file):
        default_only = list(templates) == ["default"]
        named = [{"name": name, "template": template} for name, template in templates.items()]
        config["chat_template"] = templates["default"] if default_only else named
    return config


def _chat_templates(file: GGUFFile) -> dict[str, str]:
    names = file.list_of("tokenizer.chat_templates", str)
    found = {"default": file.find("tokenizer.chat_template", str)}
    found |= {name: file.find(f"tokenizer.chat_template.{name}", str) for name in names}
    return {name: template for name, template in found.items() if template}
