from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from mka_export.errors import CheckpointError
from mka_export.models.tokenizer import load_tokenizer


class PanicException(BaseException):
    """What a panic in Rust becomes in Python: no Exception, and of a class that nobody exports."""


def test_a_panic_of_the_parser_is_the_tokenizers_fault(pico_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def panic(*_: object, **__: object) -> None:
        raise PanicException("index out of bounds")

    monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", panic)
    with pytest.raises(CheckpointError, match="cannot load the tokenizer in .*index out of bounds"):
        load_tokenizer(pico_llama)


def test_ctrl_c_is_nobodys_fault(pico_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_tokenizer(pico_llama)
