"""How byte-level BPE tokenizers cut text: llama.cpp's names <-> the structure in ``tokenizer.json``.

A GGUF file only names its pre-tokenizer (``tokenizer.ggml.pre``), a ``tokenizer.json`` only spells it
out; ``pretokenizers.toml`` beside this module is the one table that links them, in both directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mka_export.data import read_toml
from mka_export.errors import UnsupportedError, unknown_name

TABLE = Path(__file__).parent / "pretokenizers.toml"

# The expression that tokenizers' ByteLevel applies itself unless told not to.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class PreTokenizer:
    """One entry of the table.

    Attributes:
        name: llama.cpp's name for it.
        splits: regular expressions, applied in order; ``gpt2`` stands for ``GPT2``.
        aliases: other names under which llama.cpp does the same.
        ignore_merges: a piece that is a token as a whole is taken whole.
        adds_bos: llama.cpp puts BOS first unless the file says otherwise.
        normalizers: types of normalizer that may stand in ``tokenizer.json`` though llama.cpp has none.
    """

    name: str
    splits: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    ignore_merges: bool = False
    adds_bos: bool = False
    normalizers: tuple[str, ...] = ()

    def json(self) -> dict[str, Any]:
        """Return the ``pre_tokenizer`` of a ``tokenizer.json``, in the form the models' own files have."""
        *before, last = self.splits
        if last != "gpt2":
            before.append(last)
        steps = [_step(split) for split in before]
        steps.append(
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": last == "gpt2"}
        )
        return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


def pre_tokenizer(name: str) -> PreTokenizer:
    """Return the pre-tokenizer that llama.cpp calls ``name``.

    Raises:
        UnsupportedError: the table has none of that name.
    """
    for entry in _table():
        if name == entry.name or name in entry.aliases:
            return entry
    known = [known for entry in _table() for known in (entry.name, *entry.aliases)]
    raise UnsupportedError(unknown_name("pre-tokenizer", name, known), f"Add it to {TABLE.name}.")


def identify(tokenizer_json: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a byte-level BPE ``tokenizer.json``.

    Only what decides token ids is looked at: the expressions in their order, whether whole tokens go
    before merges (``ignore_merges``) and the normalizer.

    Raises:
        UnsupportedError: llama.cpp has none that cuts so, or the table lacks it; the expressions are named.
    """
    normalizers = [step["type"] for step in _flatten(tokenizer_json.get("normalizer"), "normalizers")]
    steps = _flatten(tokenizer_json.get("pre_tokenizer"), "pretokenizers")
    byte_level = bool(steps) and steps[-1]["type"] == "ByteLevel"
    splits = tuple(split for step in steps for split in _splits(step))
    ignore_merges = bool(tokenizer_json.get("model", {}).get("ignore_merges", False))
    if byte_level:
        for entry in _table():
            if (entry.splits, entry.ignore_merges) == (splits, ignore_merges) and set(normalizers) <= {
                *entry.normalizers
            }:
                return entry.name
    seen = ", ".join(splits) or "no expression"
    raise UnsupportedError(
        f"unknown pre-tokenizer: {seen} (byte level: {byte_level}, ignore_merges: {ignore_merges}, "
        f"normalizers: {', '.join(normalizers) or 'none'})",
        f"If llama.cpp has it, add it to {TABLE.name}.",
    )


@cache
def _table() -> tuple[PreTokenizer, ...]:
    return tuple(
        PreTokenizer(
            name=name,
            splits=tuple(entry["splits"]),
            aliases=tuple(entry.get("aliases", ())),
            ignore_merges=entry.get("ignore_merges", False),
            adds_bos=entry.get("adds_bos", False),
            normalizers=tuple(entry.get("normalizers", ())),
        )
        for name, entry in read_toml(TABLE).items()
    )


def _step(split: str) -> dict[str, Any]:
    if split == r"\p{N}":
        return {"type": "Digits", "individual_digits": True}
    return {
        "type": "Split",
        "pattern": {"Regex": GPT2 if split == "gpt2" else split},
        "behavior": "Isolated",
        "invert": False,
    }


def _splits(step: Mapping[str, Any]) -> list[str]:
    """Return the expressions that one step of a pre-tokenizer applies; an odd step is returned as its JSON."""
    match step:
        case {"type": "ByteLevel"} if not step.get("add_prefix_space", True):
            return ["gpt2"] if step.get("use_regex", True) else []
        case {"type": "Digits"}:
            return [r"\p{N}" if step.get("individual_digits") else r"\p{N}+"]
        case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated"} if not step.get("invert"):
            return ["gpt2" if regex == GPT2 else regex]
    return [str(dict(step))]


def _flatten(step: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    if step.get("type") == "Sequence":
        return [inner for part in step[key] for inner in _flatten(part, key)]
    return [step]
