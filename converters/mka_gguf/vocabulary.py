"""A checkpoint's tokenizer as GGUF metadata: byte-level BPE as ``gpt2``, SentencePiece BPE as ``llama``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from gguf.constants import Keys
from sentencepiece import SentencePieceProcessor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from mka_export.errors import ConversionError, UnsupportedError
from mka_export.models.pretokenizer import identify
from mka_export.models.tokenizer import load_tokenizer

SPACE = "▁"  # how SentencePiece spells a space
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
SPACES = (
    "llama.cpp, as SentencePiece, also puts its space before text that begins with one or follows a special token;"
    " transformers' Metaspace does not"
)
MERGE_ORDER = "transformers merges in another order than the scores in tokenizer.model, which are what llama.cpp gets"
SPECIAL = ("bos", "eos", "unk", "pad", "eot")


@dataclass(frozen=True)
class Vocabulary:
    """All that a GGUF file says about the tokenizer.

    Attributes:
        model: ``gpt2`` or ``llama``.
        pre: llama.cpp's name of the pre-tokenizer.
        tokens: one an embedding row.
        types: a ``TokenType`` a token.
        scores: one a token, higher merged first (``llama``), else empty.
        merges: pairs, joined by a space, first merged first (``gpt2``), else empty.
        special: kind (``bos``) -> id.
        add_bos: whether a BOS is put before every text.
        add_eos: whether an EOS is put after every text.
        add_space_prefix: whether a space is put before every text.
        chat_templates: name -> Jinja text; the usual one is ``default``.
        padding: how many of ``tokens`` stand for embedding rows that no token has.
        warnings: where llama.cpp may cut text differently.
    """

    model: str
    pre: str
    tokens: Sequence[str]
    types: Sequence[TokenType]
    scores: Sequence[float]
    merges: Sequence[str]
    special: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_templates: Mapping[str, str]
    padding: int
    warnings: tuple[str, ...] = ()

    def add_to(self, writer: GGUFWriter) -> None:
        """Write it as metadata."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_scores(self.scores)
        writer.add_token_merges(self.merges)
        for kind, token in self.special.items():
            getattr(writer, f"add_{kind}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        writer.add_add_space_prefix(self.add_space_prefix)
        named = sorted(set(self.chat_templates) - {"default"})
        for name in named:
            writer.add_string(Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name), self.chat_templates[name])
        writer.add_array(Keys.Tokenizer.CHAT_TEMPLATES, named)
        writer.add_string(Keys.Tokenizer.CHAT_TEMPLATE, self.chat_templates.get("default", ""))


def read_vocabulary(path: Path, config: PretrainedConfig, rows: int) -> Vocabulary:
    """Read the tokenizer in checkpoint folder ``path``, as transformers builds it.

    Args:
        path: the folder.
        config: the model's, for special tokens that the tokenizer does not name.
        rows: embedding rows; those that no token has become unused tokens ``[PADn]``.

    Raises:
        CheckpointError: there is no tokenizer.
        ConversionError: it has a token beyond the embedding.
        UnsupportedError: it is of a kind that llama.cpp has no counterpart for.
    """
    tokenizer = load_tokenizer(path)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedError(
            f"the tokenizer in {path} has no form as tokenizer.json", "Save it with a current transformers."
        )
    data: dict[str, Any] = json.loads(backend.to_str())
    kind = data["model"]["type"]
    if kind != "BPE":
        raise UnsupportedError(
            f"the tokenizer in {path} is of type {kind}", "BPE and SentencePiece BPE can be converted."
        )
    sentencepiece = bool(data["model"].get("byte_fallback"))
    tokens, types = _tokens(path, data, rows, sentencepiece, tokenizer.unk_token_id)
    add_bos, add_eos = _added_around(path, tokenizer)
    prefix, about_spaces = _space_prefix(data) if sentencepiece else (False, ())
    scores, about_merges = _scores(path, data, tokens) if sentencepiece else ([], ())
    return Vocabulary(
        model="llama" if sentencepiece else "gpt2",
        pre="default" if sentencepiece else identify(data),
        tokens=tokens,
        types=types,
        scores=scores,
        merges=() if sentencepiece else tuple(" ".join(pair) for pair in _merges(data)),
        special=_special(tokenizer, config),
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=prefix,
        chat_templates=_chat_templates(tokenizer),
        padding=types.count(TokenType.UNUSED),
        warnings=about_spaces + about_merges,
    )


def _tokens(
    path: Path, data: Mapping[str, Any], rows: int, sentencepiece: bool, unknown: int | None
) -> tuple[list[str], list[TokenType]]:
    vocab: dict[str, int] = data["model"]["vocab"]
    added: list[dict[str, Any]] = data["added_tokens"]
    count = max([*vocab.values(), *(token["id"] for token in added)]) + 1
    if count > rows:
        raise ConversionError(
            f"the tokenizer in {path} has ids up to {count - 1}, the embedding {rows} rows",
            "Use the tokenizer that belongs to the model.",
        )
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [TokenType.UNUSED] * rows
    for text, token in vocab.items():
        tokens[token] = text
        byte = sentencepiece and BYTE.fullmatch(text)
        types[token] = TokenType.BYTE if byte else TokenType.NORMAL
    for entry in added:
        token, text = entry["id"], entry["content"]
        types[token] = TokenType.CONTROL if entry["special"] else TokenType.USER_DEFINED
        # llama.cpp looks for user-defined tokens in the text before it spells its spaces SentencePiece's way
        tokens[token] = text if entry["special"] or not sentencepiece else text.replace(SPACE, " ")
    if sentencepiece and unknown is not None:
        types[unknown] = TokenType.UNKNOWN
    return tokens, types


def _merges(data: Mapping[str, Any]) -> list[Sequence[str]]:
    merges = data["model"]["merges"]
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]


def _scores(path: Path, data: Mapping[str, Any], tokens: Sequence[str]) -> tuple[list[float], tuple[str, ...]]:
    """Give every token a score: llama.cpp merges the pair that makes the piece with the highest one.

    SentencePiece's own scores are used where ``tokenizer.model`` has them. In a ``tokenizer.json`` the
    order of merges is all that is left of them: a piece's score is minus the rank of the first merge that
    makes it. Single characters and tokens that are never made by merging need none.
    """
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merges(data)):
        ranks.setdefault(left + right, rank)
    by_rank = [-float(ranks.get(token, len(ranks))) for token in tokens]
    if not (path / "tokenizer.model").is_file():
        return by_rank, ()
    pieces = SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    own = {pieces.id_to_piece(i): pieces.get_score(i) for i in range(pieces.get_piece_size())}
    merged = [own[piece] for piece in ranks if piece in own]
    warnings = () if merged == sorted(merged, reverse=True) else (MERGE_ORDER,)
    return [own.get(token, score) for token, score in zip(tokens, by_rank, strict=True)], warnings


def _added_around(path: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    added = tokenizer.encode("")
    for bos in (True, False):
        for eos in (False, True):
            if added == [tokenizer.bos_token_id] * bos + [tokenizer.eos_token_id] * eos:
                return bos, eos
    raise UnsupportedError(
        f"the tokenizer in {path} puts {tokenizer.convert_ids_to_tokens(added)} around a text",
        "llama.cpp adds a BOS, an EOS or both.",
    )


def _space_prefix(data: Mapping[str, Any]) -> tuple[bool, tuple[str, ...]]:
    """Tell whether a space is put before the text, by a normalizer or by a pre-tokenizer."""
    steps = [step for part in ("normalizer", "pre_tokenizer") for step in _steps(data.get(part))]
    if any(step["type"] == "Prepend" for step in steps):
        return True, ()
    schemes = {step["prepend_scheme"] for step in steps if step["type"] == "Metaspace"}
    return bool(schemes & {"always", "first"}), (SPACES,) if schemes & {"always", "first"} else ()


def _steps(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    inner = part.get("normalizers") or part.get("pretokenizers")
    return [step for p in inner for step in _steps(p)] if inner else [part]


def _special(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> dict[str, int]:
    ids = {kind: getattr(tokenizer, f"{kind}_token_id", None) for kind in SPECIAL}
    for kind in SPECIAL:
        if ids[kind] is None:
            ids[kind] = getattr(config, f"{kind}_token_id", None)
    return {kind: token for kind, token in ids.items() if isinstance(token, int)}


def _chat_templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    template = tokenizer.chat_template
    if template is None:
        return {}
    return {"default": template} if isinstance(template, str) else dict(template)
