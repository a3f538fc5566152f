"""The tokenizer that ships in the folder: the checkpoint's, so that onnxruntime-genai reads digits as it does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mka_export.data import load_json
from mka_export.models.checkpoint import Checkpoint

TOKENIZER = "tokenizer.json"
OTHERS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
DIGITS = "0123456789"


def write_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """Put the checkpoint's own tokenizer in ``folder``, in the place of what the builder saved anew.

    A checkpoint without ``tokenizer.json`` leaves the builder's. It is written without white space: less than half of its size.

    onnxruntime-genai knows no pre-tokenizer that splits off digits, by which SmolLM2's begins: where two blanks come before
    a digit it reads other tokens. Added tokens it does split off, so the ten digits become such, under the ids that they have.
    To whoever splits off digits anyway that makes no difference.
    """
    source = checkpoint.path if (checkpoint.path / TOKENIZER).is_file() else folder
    for name in OTHERS:
        if source == checkpoint.path:
            (folder / name).unlink(missing_ok=True)
        if (checkpoint.path / name).is_file():
            shutil.copyfile(checkpoint.path / name, folder / name)
    tokenizer = load_json(source / TOKENIZER)
    if _splits_digits_first(tokenizer):
        _add_digits(tokenizer)
    compact = json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":"))
    (folder / TOKENIZER).write_text(compact, encoding="utf-8")


def _splits_digits_first(tokenizer: dict[str, Any]) -> bool:
    """Whether digits are split off before all else, and what is left is read as it would be by itself."""
    steps = tokenizer.get("pre_tokenizer") or {}
    first, *rest = steps.get("pretokenizers") or [steps]
    alone = first.get("type") == "Digits" and first["individual_digits"]
    return alone and tokenizer.get("normalizer") is None and not any(step.get("add_prefix_space") for step in rest)


def _add_digits(tokenizer: dict[str, Any]) -> None:
    vocabulary, added = tokenizer["model"]["vocab"], tokenizer.setdefault("added_tokens", [])
    missing = [digit for digit in DIGITS if digit in vocabulary and all(digit != token["content"] for token in added)]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    added += [{"id": vocabulary[digit], "content": digit, **flags} for digit in missing]
    added.sort(key=lambda token: token["id"])
