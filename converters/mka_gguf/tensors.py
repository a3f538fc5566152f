"""The tensors of a GGUF file: their names, types and order, made from a checkpoint one at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from torch import Tensor

from mka_export.errors import ConversionError, UnsupportedError, unknown_name
from mka_export.models.checkpoint import Checkpoint
from mka_export.models.outline import Outline

UNQUANTIZED = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
}
_DTYPES = {kind: dtype for dtype, kind in UNQUANTIZED.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of the file to be.

    Attributes:
        name: in the GGUF file.
        shape: outermost dimension first, as in torch.
        kind: F32, F16 or BF16.
        source: its name in the checkpoint; empty for a tensor that is computed.
        read: makes the tensor, in any floating-point type.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    source: str
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """The size of the data in bytes."""
        return int(np.prod(self.shape)) * _DTYPES[self.kind].itemsize

    def data(self) -> NDArray[Any]:
        """Make the tensor's data; BF16, which numpy lacks, as its bits.

        Raises:
            ConversionError: a value is NaN or infinite, or becomes so in this type.
        """
        tensor = self.read()
        stored = tensor.to(_DTYPES[self.kind])
        if not _finite(stored):
            if _finite(tensor):
                largest = float(tensor.abs().max())
                raise ConversionError(
                    f"tensor {self.source} reaches {largest:g}, more than {self.kind.name} can hold",
                    "Use the precision bf16 or f32.",
                )
            raise ConversionError(
                f"tensor {self.source} holds NaN or infinity", "The model is damaged: fetch it again."
            )
        bits = stored.view(torch.int16) if self.kind == GGMLQuantizationType.BF16 else stored
        array: NDArray[Any] = bits.contiguous().numpy()
        return array


def _finite(tensor: Tensor) -> bool:
    return bool(torch.stack(tensor.aminmax()).isfinite().all())  # NaN comes through; far faster than isfinite on all


def gguf_names(model: Outline) -> dict[str, str]:
    """Return checkpoint name -> GGUF name of every tensor that is written, in the order of writing.

    A head that is tied to the embedding is left out: llama.cpp then uses the embedding.

    Raises:
        UnsupportedError: llama.cpp does not know the architecture, or has no name for a tensor of it.
    """
    architecture = model.architecture
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture.gguf_arch not in known:
        raise UnsupportedError(unknown_name("GGUF architecture", architecture.gguf_arch, known))
    name_map = gguf.get_tensor_name_map(known[architecture.gguf_arch], model.num_layers)
    roles = architecture.tensors
    order = [roles["embedding"]]
    for index in range(model.num_layers):
        layer = (architecture.layer_name(index, inside) for inside in architecture.roles)
        order += [name for name in layer if name in model.shapes]
    order.append(roles["norm"])
    if roles["head"] in model.shapes:
        order.append(roles["head"])
    names: dict[str, str] = {}
    for name in order:
        new = name_map.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise UnsupportedError(f"llama.cpp's {architecture.gguf_arch} has no tensor for {name}")
        names[name] = new
    return names


def plan_tensors(checkpoint: Checkpoint, matrix: GGMLQuantizationType, heads: int, kv_heads: int) -> list[Entry]:
    """Return the entries of a file whose matrices are of type ``matrix``; vectors are F32, as llama.cpp wants.

    Args:
        checkpoint: the model.
        matrix: F32, F16 or BF16.
        heads: attention heads, for the row order of queries.
        kv_heads: key and value heads, for the row order of keys.

    Raises:
        UnsupportedError: see ``gguf_names``.
    """
    return [
        Entry(
            name=new,
            shape=(shape := checkpoint.shapes[name]),
            kind=matrix if len(shape) > 1 else GGMLQuantizationType.F32,
            source=name,
            read=_reader(checkpoint, name, heads, kv_heads),
        )
        for name, new in gguf_names(Outline.of_checkpoint(checkpoint)).items()
    ]


def _reader(checkpoint: Checkpoint, name: str, heads: int, kv_heads: int) -> Callable[[], Tensor]:
    architecture = checkpoint.architecture
    role = architecture.roles.get(architecture.split(name)[1], "")
    if role not in architecture.permuted:
        return lambda: checkpoint.tensor(name)
    return lambda: pair_neighbours(checkpoint.tensor(name), kv_heads if role.startswith("k") else heads)


def pair_neighbours(rows: Tensor, heads: int) -> Tensor:
    """Reorder the rows of every head from Hugging Face's rotary order to that of llama.cpp's ``llama``.

    Rotary embedding turns pairs of dimensions; Hugging Face pairs i with i + d/2, llama.cpp's "normal"
    rotation i with i + 1 (``LLAMA_ROPE_TYPE_NORM``), so row i of the first half goes before row i of the second.

    Args:
        rows: (heads * d, ...): a projection's weight or bias.
        heads: number of heads.
    """
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
