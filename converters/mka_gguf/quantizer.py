"""llama.cpp's own quantizer, called through its C interface in a process of its own."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

import llama_cpp
import numpy as np
from gguf import LlamaFileType
from numpy.typing import NDArray

from mka_export.child import Child
from mka_export.errors import ConversionError
from mka_export.progress import Task

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


def _quantize(
    connection: Connection, source: Path, out: Path, file_type: LlamaFileType, imatrix: dict[str, NDArray[np.float32]]
) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = int(file_type)
    params.nthread = 0  # as many as there are cores: the result does not depend on it
    params.max_buf_size = BUFFER_BYTES
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
        if line.startswith("["):  # "[  12/ 272]  blk.3.attn_q.weight - ..."
            connection.send(line)

    llama_cpp.llama_log_set(keep, None)
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)):
        words = " ".join("".join(log).split())
        raise ConversionError(f"llama.cpp cannot quantize to {file_type.name}: {words}")
    connection.send(None)
