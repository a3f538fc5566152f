"""Write a GGUF file tensor by tensor, and look at what is in one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFWriter

from mka_export.models.checkpoint import Checkpoint
from mka_export.models.gguf_file import read_gguf
from mka_export.progress import Task
from mka_gguf.settings import Precision
from mka_gguf.tensors import Entry

CARD_LISTS = ("license", "language", "tags", "datasets", "base_model")  # keys of a model card that may be lists


def add_general(
    writer: GGUFWriter, checkpoint: Checkpoint, file_stem: str | None, precision: Precision, entries: list[Entry]
) -> None:
    """Write what the model is: name, origin and licence from its model card, size, precision.

    Args:
        writer: of the file.
        checkpoint: the model; its README.md may have a front matter.
        file_stem: goes before the card's name; without either the folder's name is used.
        precision: of the file that will ship.
        entries: all tensors.
    """
    metadata = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), _model_card(checkpoint.path))
    metadata.name = file_stem or metadata.name or checkpoint.path.resolve().name
    parameters = sum(prod(entry.shape) for entry in entries)
    metadata.size_label = gguf.size_label(parameters, parameters, expert_params=0, expert_count=0)
    writer.add_type(gguf.GGUFType.MODEL)
    metadata.set_gguf_meta_model(writer)
    writer.add_file_type(int(precision.file_type))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _model_card(path: Path) -> dict[str, str | list[str]]:
    """Return the front matter of README.md, as far as it is made of texts: the gguf package writes what it finds."""
    try:
        card = gguf.Metadata.load_model_card(path)
    except Exception:  # whatever its YAML parser raises: a broken README is no reason to refuse a model
        return {}
    texts = {key: value for key, value in card.items() if isinstance(value, str)}
    lists = {key: card[key] for key in CARD_LISTS if isinstance(card.get(key), list)}
    return texts | {key: value for key, value in lists.items() if all(isinstance(item, str) for item in value)}


def add_imatrix(writer: GGUFWriter, calibration: str, entries: int) -> None:
    """Write which text guided the quantizer, under the keys of llama.cpp's ``llama-quantize``.

    Args:
        writer: of the file.
        calibration: sha256 of the calibration tokens.
        entries: how many matrices had statistics.
    """
    writer.add_string("quantize.imatrix.dataset", f"sha256:{calibration}")
    writer.add_uint32("quantize.imatrix.entries_count", entries)


def announce(writer: GGUFWriter, entries: list[Entry]) -> None:
    """Tell ``writer`` the name, shape and type of every tensor, before any is read."""
    for entry in entries:
        # numpy's type is not looked at where the GGUF type is given
        writer.add_tensor_info(entry.name, entry.shape, np.dtype("float32"), entry.nbytes, raw_dtype=entry.kind)


def write(writer: GGUFWriter, path: Path, entries: list[Entry], task: Task) -> None:
    """Write the file ``path``: metadata, then the data of the announced ``entries``, holding one at a time.

    Raises:
        CheckpointError: a tensor cannot be read.
        ConversionError: a tensor's values cannot be stored.
        OSError: the disk is full, say.
    """
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(entry.data())
            task.advance()
    finally:
        writer.close()


@dataclass(frozen=True)
class Contents:
    """What a GGUF file's matrices are stored as, against what was asked for.

    Attributes:
        types: type name -> number of tensors, vectors included.
        fallbacks: type name -> number of matrices of that type whose rows do not fit the precision's block.
        fallback_share: the share of the matrices' values in those.
        bits_per_weight: of the matrices.
    """

    types: dict[str, int]
    fallbacks: dict[str, int]
    fallback_share: float
    bits_per_weight: float

    @property
    def fallback_text(self) -> str:
        """The fallbacks in words, e.g. ``166 Q5_0, 15 Q8_0``."""
        return ", ".join(f"{count} {name}" for name, count in self.fallbacks.items())


def read_contents(path: Path, precision: Precision) -> Contents:
    """Look at the tensor types of GGUF file ``path``.

    llama.cpp replaces a type whose block does not divide the rows by one of smaller blocks (Q4_K by Q5_0, say,
    or F16 where 32 does not divide them either), and leaves everything else to the mix, all of whose types have
    the block of the main one or a larger one. So a matrix of smaller blocks is one that fell back.
    """
    tensors = read_gguf(path).tensors.values()
    matrices = [tensor for tensor in tensors if len(tensor.shape) > 1]
    fallen = [tensor for tensor in matrices if GGML_QUANT_SIZES[tensor.type][0] < precision.block]
    values = sum(prod(tensor.shape) for tensor in matrices)
    return Contents(
        types=dict(sorted(Counter(tensor.type.name for tensor in tensors).items())),
        fallbacks=dict(sorted(Counter(tensor.type.name for tensor in fallen).items())),
        fallback_share=sum(prod(tensor.shape) for tensor in fallen) / values,
        bits_per_weight=8 * sum(tensor.data.nbytes for tensor in matrices) / values,
    )
