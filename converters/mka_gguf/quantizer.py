"""llama.cpp's own quantizer, called through its C interface."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import llama_cpp
import numpy as np
from gguf import LlamaFileType
from numpy.typing import NDArray

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
    """
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
    with captured_log(task) as lines:
        failed = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params))
    if failed:
        words = " ".join("".join(lines[-8:]).split())
        raise ConversionError(f"llama.cpp cannot quantize to {file_type.name}: {words}")


@contextmanager
def captured_log(task: Task) -> Iterator[list[str]]:
    """Keep what llama.cpp logs while the block runs, and off the terminal; a line on a tensor is a step of ``task``."""
    lines: list[str] = []

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def keep(_level: int, text: bytes, _data: object) -> None:
        line = text.decode("utf-8", "replace")
        lines.append(line)
        if line.startswith("["):  # "[  12/ 272]  blk.3.attn_q.weight - ..."
            task.advance()

    previous, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(previous), ctypes.byref(data))
    llama_cpp.llama_log_set(keep, None)
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(previous, data)
