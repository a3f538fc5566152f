"""llama.cpp's own quantizer, called through its C interface in a process of its own."""

from __future__ import annotations

import ctypes
import re
from collections import deque
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path

import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType
from numpy.typing import NDArray

from mka_export.child import Child
from mka_export.errors import ConversionError
from mka_export.progress import Task

# "[  12/ 272]  blk.3.attn_q.weight - [...], type = f16, size = 1.69 MiB -> 0.58 MiB (q5_0)"
PLANNED = re.compile(r"\[ *\d+/ *\d+\] +(\S+) .* -> .*\((\w+)\)$")
BUFFER_BYTES = 256 << 20  # of tensor rows held at once; the library's default is 8 GiB


def quantize(
    source: Path, out: Path, file_type: LlamaFileType, imatrix: Mapping[str, NDArray[np.float32]], task: Task
) -> None:
    """Quantize GGUF file ``source`` into ``out``.

    Args:
        source: a file of F32, F16 or BF16 tensors.
        out: the file to write.
        file_type: the mix of types.
        imatrix: GGUF tensor name -> mean square of each input column, (columns,); empty for none.
        task: advanced once a tensor.

    Raises:
        ConversionError: the library fails; the message carries its last words.
        RuntimeFailure: it crashes or hangs.
    """
    with Child("llama.cpp's quantizer", _quantize, source, out, file_type, dict(imatrix)) as child:
        while child.receive() is not None:
            task.advance()


def planned_types(source: Path, file_type: LlamaFileType, *, guided: bool) -> dict[str, GGMLQuantizationType]:
    """Return tensor name -> the type that ``quantize`` would give it, where it would give another; no data are read.

    Args:
        source: a file as for ``quantize``, whose data may be anything.
        file_type: the mix of types.
        guided: whether there would be an imatrix.

    Raises:
        ConversionError, RuntimeFailure: as ``quantize``.
    """
    imatrix = {"none": np.ones(1, dtype=np.float32)} if guided else {}
    types = {}
    with Child("llama.cpp's quantizer", _plan, source, file_type, imatrix) as child:
        for line in str(child.receive()).splitlines():
            if found := PLANNED.match(line):
                types[found[1]] = GGMLQuantizationType[found[2].upper()]
    return types


def _quantize(
    connection: Connection, source: Path, out: Path, file_type: LlamaFileType, imatrix: dict[str, NDArray[np.float32]]
) -> None:
    def tell(line: str) -> None:
        if line.startswith("["):  # "[  12/ 272]  blk.3.attn_q.weight - ..."
            connection.send(line)

    _run(source, out, file_type, imatrix, tell, dry=False)
    connection.send(None)


def _plan(
    connection: Connection, source: Path, file_type: LlamaFileType, imatrix: dict[str, NDArray[np.float32]]
) -> None:
    said: list[str] = []
    _run(source, source.with_name("unwritten.gguf"), file_type, imatrix, said.append, dry=True)
    connection.send("".join(said))


def _run(
    source: Path,
    out: Path,
    file_type: LlamaFileType,
    imatrix: dict[str, NDArray[np.float32]],
    tell: Callable[[str], None],
    *,
    dry: bool,
) -> None:
    """Call the library; ``tell`` is given what it says, in pieces of lines."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = int(file_type)
    params.nthread = 0  # as many as there are cores: the result does not depend on it
    params.max_buf_size = BUFFER_BYTES
    params.dry_run = dry
    entries = (llama_cpp.llama_model_imatrix_data * (len(imatrix) + 1))()  # the last one, all zeros, ends the list
    for entry, (name, values) in zip(entries, imatrix.items(), strict=False):
        entry.name = name.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
    if imatrix:
        params.imatrix = entries
    log: deque[str] = deque(maxlen=8)

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def keep(_level: int, text: bytes, _data: object) -> None:
        line = text.decode("utf-8", "replace")
        log.append(line)
        tell(line)

    llama_cpp.llama_log_set(keep, None)
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)):
        words = " ".join("".join(log).split())
        raise ConversionError(f"llama.cpp cannot quantize to {file_type.name}: {words}")
