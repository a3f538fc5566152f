"""Hugging Face checkpoints, read a tensor at a time.

A checkpoint is a folder with ``config.json``, tokenizer files and ``*.safetensors``, with an index
``model.safetensors.index.json`` where there is more than one shard.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mka_export.data import load_json
from mka_export.errors import CheckpointError, UnsupportedError
from mka_export.hashes import file_sha256
from mka_export.models.architecture import Architecture, architecture_of

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
STORED = ("F64", "F32", "F16", "BF16")  # safetensors' names of the types that we compute with

# What is carried unchanged from a checkpoint to one made from it, besides its licence: everything that says how text
# becomes ids.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Tensors are read from disk when asked for, and never kept.

    Attributes:
        path: the folder.
        config: the contents of ``config.json``.
        architecture: the model's family.
        shards: tensor name -> shard file name.
        shapes: tensor name -> shape.
    """

    path: Path
    config: Mapping[str, Any]
    architecture: Architecture
    shards: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Open the checkpoint in folder ``path`` and check that it is whole.

        Raises:
            CheckpointError: a file is missing or damaged, or config and tensors disagree.
            UnsupportedError: the model needs custom code, is quantized, or is of an unknown family.
        """
        config, architecture = read_config(path)
        checkpoint = cls(path, config, architecture, *_shards(path))
        checkpoint._check_layers()
        return checkpoint

    @property
    def num_layers(self) -> int:
        """The number of decoder layers."""
        return self.architecture.layer_count(self.config)

    @property
    def hidden_size(self) -> int:
        """The width of the residual stream."""
        return self.shapes[self.architecture.tensors["embedding"]][1]

    @property
    def vocab_size(self) -> int:
        """The number of embedding rows (padding rows included)."""
        return self.shapes[self.architecture.tensors["embedding"]][0]

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the layers' matrices."""
        return self.tensor(self.architecture.layer_name(0, self.architecture.layer["o"])).dtype

    @property
    def head(self) -> str:
        """The name of the tensor that makes logits: the embedding where the head is tied to it."""
        head = self.architecture.tensors["head"]
        tied = self.config.get("tie_word_embeddings", False) or head not in self.shards
        return self.architecture.tensors["embedding"] if tied else head

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, as stored.

        Raises:
            CheckpointError: there is none of that name, or its file is damaged.
        """
        if name not in self.shards:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        with _opened(self.path / self.shards[name]) as f:
            tensor: Tensor = f.get_tensor(name)
            return tensor

    def rows(self, name: str, indices: Tensor) -> Tensor:
        """Read some rows of a matrix, as stored: (len(indices), columns)."""
        with _opened(self.path / self.shards[name]) as f:
            piece = f.get_slice(name)
            return torch.cat([piece[i : i + 1] for i in indices.tolist()])

    def layer(self, index: int, *names: str) -> dict[str, Tensor]:
        """Read tensors of layer ``index``, those called ``names`` or all: name inside the layer -> tensor."""
        wanted = {self.architecture.split(name)[1]: name for name in self.layer_names(index)}
        wanted = {inside: name for inside, name in wanted.items() if not names or inside in names}
        found: dict[str, Tensor] = {}
        for shard in {self.shards[name] for name in wanted.values()}:  # opening one reads its header
            with _opened(self.path / shard) as f:
                found |= {i: f.get_tensor(name) for i, name in wanted.items() if self.shards[name] == shard}
        return {inside: found[inside] for inside in wanted}

    def layer_names(self, index: int) -> list[str]:
        """Return the names of the tensors of layer ``index``."""
        return [name for name in self.shards if self.architecture.split(name)[0] == index]

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 over config, tokenizer and weight files: the same model, the same fingerprint."""
        digest = hashlib.sha256()
        files = {CONFIG, *self.shards.values(), *(n for n in TOKENIZER_FILES if (self.path / n).exists())}
        for name in sorted(files):
            digest.update(f"{name}:{file_sha256(self.path / name)}\n".encode())
        return digest.hexdigest()

    @cached_property
    def parameters(self) -> int:
        """The number of weights; a head tied to the embedding counts once."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def nbytes(self) -> int:
        """The size of the weight files in bytes."""
        return sum((self.path / shard).stat().st_size for shard in set(self.shards.values()))

    def _check_layers(self) -> None:
        a = self.architecture
        found: dict[int, set[str]] = {}
        outside = set()
        for name in self.shards:
            index, inside = a.split(name)
            if index is None:
                outside.add(name)
            else:
                found.setdefault(index, set()).add(inside)
        if len(found) != self.num_layers or max(found) != self.num_layers - 1:
            raise CheckpointError(
                f"{self.path / CONFIG} announces {self.num_layers} layers, the tensors make {len(found)}"
                + (f" (up to index {max(found)})" if found else ""),
                "Use a complete checkpoint.",
            )
        required, allowed = set(a.layer.values()), set(a.roles)
        missing = [a.layer_name(i, n) for i, names in found.items() for n in sorted(required - names)]
        missing += [a.tensors[role] for role in ("embedding", "norm") if a.tensors[role] not in outside]
        unknown = [a.layer_name(i, n) for i, names in found.items() for n in sorted(names - allowed)]
        unknown += sorted(outside - set(a.tensors.values()))
        for problem, names in (("lacks", missing), ("has unknown", unknown)):
            if names:
                more = f" and {len(names) - 4} more" if len(names) > 4 else ""
                raise CheckpointError(
                    f"{self.path} {problem} tensors for family {a.name}: {', '.join(names[:4])}{more}"
                )
        embedding = a.tensors["embedding"]
        if len(shape := self.shapes[embedding]) != 2:
            raise CheckpointError(f"tensor {embedding} in {self.path} is {list(shape)}, no matrix", "Fetch it again.")


def read_config(path: Path) -> tuple[dict[str, Any], Architecture]:
    """Read ``config.json`` of the checkpoint folder ``path`` and check that it is of a kind we read.

    Raises:
        CheckpointError: it is missing or damaged.
        UnsupportedError: the model needs custom code, is quantized, or is of an unknown family.
    """
    config = read_json(path / CONFIG)
    if "auto_map" in config:
        raise UnsupportedError(
            f"{path / CONFIG} asks for custom code (auto_map)", "mka-export runs no code from models."
        )
    if method := config.get("quantization_config"):
        kind = method.get("quant_method", "unknown") if isinstance(method, dict) else method
        raise UnsupportedError(f"{path} is already quantized ({kind})", "Use the model it was made from.")
    architecture = architecture_of(config)
    try:
        architecture.layer_count(config)
    except ValueError as error:
        raise CheckpointError(f"{path / CONFIG}: {error}", "Use the config that belongs to the weights.") from error
    return config, architecture


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: it is missing, unreadable or no JSON object; the message names the file.
    """
    try:
        return load_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}", "Fetch the file again.") from error


def _shards(path: Path) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """Return the file and the shape of every tensor."""
    if (path / INDEX).exists():
        weight_map = read_json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{path / INDEX} has no weight_map of names")
        files = set(weight_map.values())
        if outside := sorted(f for f in files if not _is_plain_name(f)):
            raise CheckpointError(
                f"{path / INDEX} names files outside its folder: {', '.join(outside[:4])}", "Do not use this model."
            )
        # Looked up in a listing, as the system takes not every text for a path.
        if absent := sorted(files - {file.name for file in path.iterdir() if file.is_file()}):
            raise CheckpointError(f"{path} lacks {', '.join(absent)}", "Fetch the missing shards.")
        inside = {f: _shapes(path / f) for f in files}
        if absent := sorted(name for name, f in weight_map.items() if name not in inside[f]):
            raise CheckpointError(
                f"{path / INDEX} lists tensors that their shards do not hold: {', '.join(absent[:4])}",
                "Fetch the model again.",
            )
        return weight_map, {name: inside[f][name] for name, f in weight_map.items()}
    if (path / WEIGHTS).is_file():
        shapes = _shapes(path / WEIGHTS)
        return dict.fromkeys(shapes, WEIGHTS), shapes
    if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
        raise CheckpointError(
            f"{path} holds only pickled weights (.bin, .pt), which can run code when they are read",
            "Convert them where you trust them: load the model in transformers and save_pretrained() it.",
        )
    raise CheckpointError(f"{path} holds no {WEIGHTS}")


def _is_plain_name(name: str) -> bool:
    return PurePosixPath(name).name == name == PureWindowsPath(name).name and name not in ("", ".", "..")


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    shapes = {}
    with _opened(file) as f:
        names = f.keys()  # a file, no mapping: it does not iterate
        for name in names:
            piece = f.get_slice(name)
            if (kind := piece.get_dtype()) not in STORED:
                raise UnsupportedError(
                    f"tensor {name} in {file} is stored as {kind}", "Save it as float32, float16 or bfloat16."
                )
            if not (shape := piece.get_shape()) or 0 in shape:
                raise CheckpointError(f"tensor {name} in {file} is {shape}, not numbers in rows", "Fetch it again.")
            shapes[name] = tuple(shape)
    return shapes


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open a safetensors file; what it and its library say about damage becomes a CheckpointError."""
    try:
        with safe_open(file, framework="pt") as f:
            yield f
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged: {error}", "Fetch the file again.") from error
