"""The tokenizer of a checkpoint, as transformers reads it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mka_export.errors import CheckpointError

if TYPE_CHECKING:
    from mka_export.models.checkpoint import Checkpoint  # it loads torch, which the runtimes of artifacts need not


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer in checkpoint folder ``path``.

    Raises:
        CheckpointError: there is none that transformers reads without custom code.
    """
    # tokenizer.json says everything. AutoTokenizer would build some families (Qwen2) anew from the vocabulary
    # alone, and put in what the file may not have.
    kind: type[Any] = PreTrainedTokenizerFast
    if not (path / "tokenizer.json").is_file():
        from transformers import AutoTokenizer  # it loads torch

        kind = AutoTokenizer
    try:
        tokenizer = kind.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except BaseException as error:  # transformers raises whatever its parsers raise; a panic in Rust is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise CheckpointError(
            f"cannot load the tokenizer in {path}: {error}", "A checkpoint carries tokenizer.json or tokenizer.model."
        ) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def require_rows(tokenizer: PreTrainedTokenizerBase, checkpoint: Checkpoint) -> None:
    """Check that every token has a row in the embedding; rows without a token are padding.

    Raises:
        CheckpointError: some have none.
    """
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= checkpoint.vocab_size:
        raise CheckpointError(
            f"the tokenizer in {checkpoint.path} has ids up to {largest}, the embedding {checkpoint.vocab_size} rows",
            "Use the tokenizer that belongs to the model.",
        )


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of ``text`` alone: no BOS, no EOS; special tokens spelled in it are read as such."""
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def leading_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the BOS id if the tokenizer puts one before every text, else None."""
    ids = tokenizer.encode("a")
    return tokenizer.bos_token_id if ids and ids[0] == tokenizer.bos_token_id else None


def ordinary_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return all ids but those of special and added tokens."""
    others = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return [i for i in sorted(tokenizer.get_vocab().values()) if i not in others]
