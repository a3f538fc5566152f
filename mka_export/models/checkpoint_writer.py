"""Write a checkpoint, and what belongs to one."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mka_export.errors import WorkspaceError
from mka_export.models.checkpoint import INDEX, TOKENIZER_FILES, WEIGHTS
from mka_export.models.finite import require_finite
from mka_export.models.licence import licence_files
from mka_export.publish import write_json

SHARD_BYTES = 512 << 20  # a written checkpoint is cut into files of about this size


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


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy tokenizer, generation and licence files from one checkpoint folder to another."""
    for name in (*(n for n in TOKENIZER_FILES if (source / n).is_file()), *licence_files(source)):
        shutil.copyfile(source / name, folder / name)
