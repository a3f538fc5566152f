"""Hugging Face checkpoints, read and written a tensor at a time.

A checkpoint is a folder with ``config.json``, tokenizer files and ``*.safetensors``, with an index
``model.safetensors.index.json`` where there is more than one shard.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mka_export.errors import CheckpointError, UnsupportedError, WorkspaceError
from mka_export.models.architecture import Architecture, architecture_of
from mka_export.workspace import file_sha256, write_json

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 512 << 20  # a written checkpoint is cut into files of about this size
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# What is carried unchanged from a checkpoint to one made from it: everything that says how text
# becomes ids, and the licence.
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
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Tensors are read from disk when asked for, and never kept.

    Attributes:
        path: the folder.
        config: the contents of ``config.json``.
        architecture: the model's family.
        shards: tensor name -> shard file name.
    """

    path: Path
    config: Mapping[str, Any]
    architecture: Architecture
    shards: Mapping[str, str]

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Open the checkpoint in folder ``path`` and check that it is whole.

        Raises:
            CheckpointError: a file is missing or damaged, or config and tensors disagree.
            UnsupportedError: the model needs custom code, is quantized, or is of an unknown family.
        """
        config, architecture = read_config(path)
        checkpoint = cls(path, config, architecture, _shards(path))
        checkpoint._check_layers()
        return checkpoint

    @property
    def num_layers(self) -> int:
        """The number of decoder layers."""
        return self.architecture.layer_count(self.config)

    @property
    def hidden_size(self) -> int:
        """The width of the residual stream."""
        return int(self.config["hidden_size"])

    @property
    def vocab_size(self) -> int:
        """The number of embedding rows (padding rows included)."""
        return self.shape(self.architecture.tensors["embedding"])[0]

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
        file = self.path / self.shards[name]
        try:
            with safe_open(file, framework="pt") as f:
                tensor: Tensor = f.get_tensor(name)
                return tensor
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {name} from {file}: {error}", "Fetch the file again.") from error

    def rows(self, name: str, indices: Tensor) -> Tensor:
        """Read some rows of a matrix, as stored: (len(indices), columns)."""
        with safe_open(self.path / self.shards[name], framework="pt") as f:
            piece = f.get_slice(name)
            return torch.cat([piece[i : i + 1] for i in indices.tolist()])

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        with safe_open(self.path / self.shards[name], framework="pt") as f:
            return tuple(f.get_slice(name).get_shape())

    def layer(self, index: int, *names: str) -> dict[str, Tensor]:
        """Read tensors of layer ``index``, those called ``names`` or all: name inside the layer -> tensor."""
        return {
            inside: self.tensor(name)
            for name in self.shards
            for at, inside in [self.architecture.split(name)]
            if at == index and (not names or inside in names)
        }

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
        return sum(math.prod(self.shape(name)) for name in self.shards)

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
        if sorted(found) != list(range(self.num_layers)):
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


class CheckpointWriter:
    """Write a checkpoint shard by shard, holding at most one shard in memory.

    Use as a context manager; the index is written when the block ends without an error.

    Args:
        folder: an existing, empty folder.
        shard_bytes: a shard is closed before it would become larger than this.
    """

    def __init__(self, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._names: list[list[str]] = []
        self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Write ``tensor``.

        Raises:
            CheckpointError: it holds NaN or infinity.
        """
        require_finite(name, tensor)
        if self._pending and self._pending_bytes + tensor.nbytes > self.shard_bytes:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes
        self._total += tensor.nbytes

    def _flush(self) -> None:
        save_tensors(self._pending, self.folder / f"shard-{len(self._names):05d}", {"format": "pt"})
        self._names.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            return
        self._flush()
        count = len(self._names)
        if count == 1:
            (self.folder / "shard-00000").rename(self.folder / WEIGHTS)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._names):
            final = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            (self.folder / f"shard-{number:05d}").rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        write_json(self.folder / INDEX, index)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file.

    Raises:
        WorkspaceError: it cannot be written, for example because the disk is full.
    """
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, metadata=metadata)
    except SafetensorError as error:
        raise WorkspaceError(f"cannot write {path}: {error}", "Make room, and run the command again.") from error


def require_finite(name: str, tensor: Tensor) -> None:
    """Check the numbers of the tensor called ``name``.

    Raises:
        CheckpointError: it holds NaN or infinity.
    """
    if not bool(torch.stack(tensor.aminmax()).isfinite().all()):  # NaN comes through; far faster than isfinite
        raise CheckpointError(f"tensor {name} holds NaN or infinity", "The model is damaged: fetch it again.")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy tokenizer, generation and licence files from one checkpoint folder to another."""
    names = [n for n in TOKENIZER_FILES if (source / n).is_file()]
    names += [p.name for pattern in LICENCE_FILES for p in source.glob(pattern) if p.is_file()]
    for name in names:
        shutil.copyfile(source / name, folder / name)


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
    return config, architecture_of(config)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: it is missing, unreadable or no JSON object; the message names the file.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return data


def _shards(path: Path) -> dict[str, str]:
    if (path / INDEX).exists():
        weight_map = read_json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{path / INDEX} has no weight_map of names")
        files = set(weight_map.values())
        if outside := sorted(f for f in files if not _is_plain_name(f)):
            raise CheckpointError(
                f"{path / INDEX} names files outside its folder: {', '.join(outside[:4])}", "Do not use this model."
            )
        if absent := sorted(f for f in files if not (path / f).is_file()):
            raise CheckpointError(f"{path} lacks {', '.join(absent)}", "Fetch the missing shards.")
        inside = {name for f in files for name in _tensor_names(path / f)}
        if absent := sorted(set(weight_map) - inside):
            raise CheckpointError(
                f"{path / INDEX} lists tensors that no shard holds: {', '.join(absent[:4])}", "Fetch the model again."
            )
        return dict(weight_map)
    if (path / WEIGHTS).is_file():
        return dict.fromkeys(_tensor_names(path / WEIGHTS), WEIGHTS)
    if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
        raise CheckpointError(
            f"{path} holds only pickled weights (.bin, .pt), which can run code when they are read",
            "Convert them where you trust them: load the model in transformers and save_pretrained() it.",
        )
    raise CheckpointError(f"{path} holds no {WEIGHTS}")


def _is_plain_name(name: str) -> bool:
    return PurePosixPath(name).name == name == PureWindowsPath(name).name and name not in ("", ".", "..")


def _tensor_names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as f:
            return list(f.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged: {error}", "Fetch the file again.") from error
