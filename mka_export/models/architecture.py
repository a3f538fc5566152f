"""Model families as data: which tensors a model is made of, and what in its config follows the layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mka_export.data import read_toml, value_of
from mka_export.errors import UnsupportedError, unknown_name

FOLDER = Path(__file__).parent / "architectures"
MAX_LAYERS = 4096  # the deepest models have below 200
INDEX = re.compile(r"(0|[1-9][0-9]{0,8})\.(.*)", re.DOTALL)  # of a layer, as layer_name writes it, and what follows


@dataclass(frozen=True)
class Architecture:
    """One model family, as its TOML file in ``architectures/`` describes it.

    Attributes:
        name: the file's name.
        classes: names found in ``config["architectures"]``.
        layers: module path of the list of decoder layers, e.g. ``model.layers``.
        tensors: role -> tensor name, outside the layers (``embedding``, ``norm``, ``head``).
        layer: role -> tensor name inside a layer, for the tensors that every layer has.
        optional: the same for tensors a layer may have.
        config: config keys that depend on the layers.
        gguf_arch: the ``general.architecture`` of llama.cpp.
        permuted: roles whose rows llama.cpp stores in its own rotary order.
    """

    name: str
    classes: tuple[str, ...]
    layers: str
    tensors: Mapping[str, str]
    layer: Mapping[str, str]
    optional: Mapping[str, str]
    config: Mapping[str, Sequence[str]]
    gguf_arch: str
    permuted: frozenset[str]

    def layer_name(self, index: int, name: str) -> str:
        """Return the full name of tensor ``name`` (inside a layer) of layer ``index``."""
        return f"{self.layers}.{index}.{name}"

    def split(self, tensor: str) -> tuple[int | None, str]:
        """Split a full tensor name into layer index and the name inside the layer (None outside)."""
        prefix = self.layers + "."
        if tensor.startswith(prefix) and (found := INDEX.fullmatch(tensor, len(prefix))):
            return int(found[1]), found[2]
        return None, tensor

    @property
    def mlp(self) -> str:
        """The name of the MLP module inside a layer."""
        return self.layer["gate"].partition(".")[0]

    @property
    def roles(self) -> dict[str, str]:
        """Name inside a layer -> role, for required and optional tensors."""
        return {name: role for role, name in {**self.layer, **self.optional}.items()}

    def layer_count(self, config: Mapping[str, Any]) -> int:
        """Return the number of layers that ``config`` announces.

        Raises:
            ValueError: it announces none, or an absurd number.
        """
        key = self.config["layer_count"][0]
        count = value_of(config, key, int)
        if not 1 <= count <= MAX_LAYERS:
            raise ValueError(f"{key} = {count} is not between 1 and {MAX_LAYERS}")
        return count

    def config_for_layers(self, config: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
        """Return ``config`` for a model that keeps only the layers ``kept`` (original indices, ascending).

        Counts become ``len(kept)``, lists with one entry a layer are sliced, and indices that point
        between layers are moved to where those layers now are.
        """
        new = dict(config)
        for key in self.config["layer_count"]:
            new[key] = len(kept)
        for key in self.config.get("per_layer", ()):
            if isinstance(new.get(key), list):
                new[key] = [new[key][i] for i in kept]
        for key in self.config.get("layer_index", ()):
            if isinstance(new.get(key), int):
                new[key] = sum(i < new[key] for i in kept)
        return new


@cache
def architectures() -> dict[str, Architecture]:
    """Return every known family by name."""
    return {path.stem: _read(path) for path in sorted(FOLDER.glob("*.toml"))}


def _read(path: Path) -> Architecture:
    data = read_toml(path)
    layer = dict(data["layer"])
    return Architecture(
        name=path.stem,
        classes=tuple(data["classes"]),
        layers=data["layers"],
        tensors=data["tensors"],
        optional=layer.pop("optional"),
        layer=layer,
        config=data["config"],
        gguf_arch=data["gguf"]["arch"],
        permuted=frozenset(data["gguf"]["permuted"]),
    )


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Return the family of a model by ``config["architectures"]``.

    Raises:
        UnsupportedError: no file in ``architectures/`` names the model's class.
    """
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else "(none named)"
    for architecture in architectures().values():
        if name in architecture.classes:
            return architecture
    known = [name for a in architectures().values() for name in a.classes]
    raise UnsupportedError(
        unknown_name("model class", str(name), known),
        "A family is one TOML file: see CONTRIBUTING.md.",
    )


def architecture_of_gguf(arch: str) -> Architecture:
    """Return the family of a GGUF file by its ``general.architecture``.

    Raises:
        UnsupportedError: no known family has that name in llama.cpp.
    """
    known = {a.gguf_arch: a for a in architectures().values()}
    if arch not in known:
        raise UnsupportedError(
            unknown_name("GGUF architecture", arch, known), "A family is one TOML file: see CONTRIBUTING.md."
        )
    return known[arch]
