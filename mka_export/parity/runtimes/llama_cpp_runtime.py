"""llama.cpp, through the C interface of llama-cpp-python: GGUF files as laptops and phones run them."""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from mka_export.errors import CheckpointError, RuntimeFailure, UsageError
from mka_export.models.chat import Conversation, Rendered, render
from mka_export.models.gguf_file import read_gguf
from mka_export.parity.runtimes import Ids, LogProbs, Prefixed, Windows
from mka_export.parity.runtimes.logits import BATCH, log_softmax, require_known, require_tokens, usable_cores

SEQUENCES = 32  # texts that go through together behind a prefix
PREFIX = 0  # the sequence that holds it
_WARNING, _ERROR, _CONTINUED = 3, 4, 5  # enum ggml_log_level in ggml.h (llama_cpp/_logger.py has others)
# GCC 12 takes the AMX instruction that configures the tiles for one that reads 8 bytes, and leaves out the stores of the other
# 56: such a llama.cpp dies by SIGSEGV at the first matrix in AMX's own layout. Without its own layouts no matrix is in it.
AMX = b"AMX_INT8 = 1" in llama_cpp.llama_print_system_info()
_log: deque[str] = deque(maxlen=8)  # the library's latest warnings and errors


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _keep_log(level: int, text: bytes, _data: ctypes.c_void_p) -> None:
    line = text.decode("utf-8", "replace").strip()
    if line and (level in (_WARNING, _ERROR) or (level == _CONTINUED and _log)):
        _log.append(line)


class _Row(NamedTuple):
    """A token of a batch."""

    token: int
    position: int
    sequence: int
    wanted: bool  # its logits


class LlamaCppRuntime:
    """A GGUF file in llama.cpp, with the library's own defaults (float16 key-value cache, attention kernel).

    ``tokenize`` is the library's tokenizer without BOS and EOS, special tokens parsed. Where the file sets
    ``tokenizer.ggml.add_space_prefix`` (SentencePiece) the library puts its space before the text; that is
    part of the tokenizer, transformers does the same for such a model, and so the ids compare. A file in
    which the key is wrong gives other ids than the original, which is a fault worth finding.

    Args:
        path: the GGUF file.
        gpu_layers: layers computed on the GPU; 0 keeps all work on the CPU, -1 puts all on the GPU.
        threads: CPU threads; by default as many as this process may use.

    Raises:
        RuntimeFailure: the file is damaged, or llama.cpp cannot load it; the message carries what was logged.
        UsageError: GPU layers are asked of a build without GPU support.
    """

    name = "llama.cpp"

    def __init__(self, path: Path, *, gpu_layers: int = 0, threads: int | None = None) -> None:
        if gpu_layers and not llama_cpp.llama_supports_gpu_offload():
            raise UsageError(
                f"--gpu-layers {gpu_layers}: this build of llama-cpp-python has no GPU support",
                "Leave the option out, or install a CUDA, Metal or Vulkan build.",
            )
        if not path.is_file():
            raise RuntimeFailure(f"{path} is not a file", "Give a .gguf file.")
        try:
            read_gguf(path)  # llama.cpp believes some counts that it should not
        except CheckpointError as error:
            raise RuntimeFailure(error.what, error.remedy) from error
        self.path, self._gpu_layers, self._threads = path, gpu_layers, threads or usable_cores()
        self.device = f"gpu ({gpu_layers if gpu_layers > 0 else 'all'} layers)" if gpu_layers else "cpu"
        self._model: Any = None
        self._context: Any = None
        self._room = 0, 0  # tokens and sequences that the context holds
        llama_cpp.llama_log_set(_keep_log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        params.check_tensors = True  # invalid block scales are found here, not as NaN later
        params.use_extra_bufts = not AMX
        _log.clear()
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise self._failure("cannot load")
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.vocab_size = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        self.ends = frozenset(i for i in range(self.vocab_size) if llama_cpp.llama_vocab_is_eog(self._vocab, i))

    def tokenize(self, text: str) -> list[int]:
        """Turn text into ids; see the class for what comes before the text."""
        data = text.encode()
        room = len(data) + 8  # never more tokens than bytes, but for a prefix
        ids = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(self._vocab, data, len(data), ids, room, False, True)
        if count < 0:
            raise self._failure(f"cannot tokenize {text[:40]!r}")
        return list(ids[:count])

    def detokenize(self, ids: Sequence[int]) -> str:
        """Turn ids into text, special tokens spelled out."""
        array = (llama_cpp.llama_token * len(ids))(*ids)
        room = -llama_cpp.llama_detokenize(self._vocab, array, len(ids), None, 0, False, True)
        if room <= 0:
            return ""
        text = ctypes.create_string_buffer(room)
        count = llama_cpp.llama_detokenize(self._vocab, array, len(ids), text, room, False, True)
        return text.raw[: max(count, 0)].decode("utf-8", "replace")

    def log_probs(self, windows: Windows) -> Iterator[LogProbs]:
        """Yield, window by window, (tokens, vocabulary) log-probabilities; row t is for token t + 1.

        The key-value cache holds one window and is cleared before each.
        """
        for window in windows:
            self._start(len(window))
            yield self._log_probs(window, 0)

    def next_log_probs(self, texts: Sequence[Prefixed], tokens: Sequence[int]) -> Iterator[LogProbs]:
        """Yield the log-probabilities of ``tokens`` right after each text, ``SEQUENCES`` texts of a group at a time.

        The prefix is a sequence of the cache, which the texts share with it (``llama_memory_seq_cp``).
        """
        for text in texts:
            parts = [text.rests[i : i + SEQUENCES] for i in range(0, len(text.rests), SEQUENCES)]
            room = len(text.prefix) + max(sum(map(len, part)) for part in parts)
            self._start(room, 1 + min(SEQUENCES, len(text.rests)))
            self._read(text.prefix)
            for part in parts:
                logits = self._ends_of(part, len(text.prefix))
                log_softmax(logits)
                yield logits[:, list(tokens)]

    def rest_log_probs(self, texts: Sequence[Prefixed]) -> Iterator[LogProbs]:
        """Yield, text by text, (tokens, vocabulary) log-probabilities of how it goes on.

        The cache is taken back to the prefix after each.
        """
        for text in texts:
            self._start(len(text.prefix) + max(map(len, text.rests)))
            self._read(text.prefix)
            for rest in text.rests:
                yield self._log_probs(np.array(rest, dtype=np.int64), len(text.prefix))
                llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self._context), PREFIX, len(text.prefix), -1)

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Continue each prompt greedily, up to a token that the file marks as ending generation."""
        return [self._continue(np.asarray(prompt, dtype=np.int64), max_new_tokens) for prompt in prompts]

    def render_chats(self, conversations: Sequence[Conversation]) -> list[Rendered] | None:
        """Render conversations by the file's template, with the tokens that llama.cpp's own programs fill in."""
        template = llama_cpp.llama_model_chat_template(self._model, None)  # empty in a file of a model without one
        if not template:
            return None
        ids = {name: getattr(llama_cpp, f"llama_vocab_{name}")(self._vocab) for name in ("bos", "eos")}
        special = {f"{name}_token": self.detokenize([i]) if i >= 0 else "" for name, i in ids.items()}
        return render(template.decode("utf-8", "replace"), special, conversations)

    def close(self) -> None:
        """Free the model."""
        self._free_context()
        if self._model:
            llama_cpp.llama_model_free(self._model)
            self._model = None

    def _continue(self, prompt: NDArray[np.int64], max_new_tokens: int) -> list[int]:
        require_tokens(prompt)
        self._start(len(prompt) + max_new_tokens)
        for start in range(0, len(prompt), BATCH):
            logits = self._decode(prompt[start : start + BATCH], start, every=False)
        new: list[int] = []
        while len(new) < max_new_tokens:
            token = int(logits[-1].argmax())
            if token in self.ends:
                break
            new.append(token)
            logits = self._decode(np.array([token]), len(prompt) + len(new) - 1, every=False)
        return new

    def _read(self, prefix: Ids) -> None:
        """Put a prefix into the empty cache."""
        ids = np.array(prefix, dtype=np.int64)
        for start in range(0, len(ids), BATCH):
            self._decode(ids[start : start + BATCH], start, every=False)

    def _log_probs(self, ids: NDArray[np.int64], position: int) -> LogProbs:
        """Run ``ids`` from ``position`` on, in pieces; returns log-probabilities (tokens, vocabulary)."""
        out = np.empty((len(ids), self.vocab_size), dtype=np.float32)
        for start in range(0, len(ids), BATCH):
            part = slice(start, start + BATCH)
            out[part] = self._decode(ids[part], position + start, every=True)
            log_softmax(out[part])
        return out

    def _ends_of(self, rests: Sequence[Ids], prefix: int) -> NDArray[np.float32]:
        """Run texts, each a sequence of its own behind the prefix; return the logits at their ends (texts, vocabulary)."""
        memory, found = llama_cpp.llama_get_memory(self._context), np.empty((len(rests), self.vocab_size), np.float32)
        rows = [
            _Row(token, prefix + i, n + 1, i == len(rest) - 1)
            for n, rest in enumerate(rests)
            for i, token in enumerate(rest)
        ]
        for n in range(len(rests)):
            llama_cpp.llama_memory_seq_cp(memory, PREFIX, n + 1, -1, -1)
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            for row, logits in zip([row for row in batch if row.wanted], self._decode_rows(batch), strict=True):
                found[row.sequence - 1] = logits
        for n in range(len(rests)):
            llama_cpp.llama_memory_seq_rm(memory, n + 1, -1, -1)
        return found

    def _start(self, tokens: int, sequences: int = 1) -> None:
        """Make an empty context that holds at least ``tokens`` tokens in so many sequences."""
        if tokens <= self._room[0] and sequences == self._room[1]:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
            return
        self._free_context()
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = tokens
        params.n_seq_max, params.kv_unified = sequences, True  # one cache, of which sequences share cells
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = self._threads
        params.offload_kqv = params.op_offload = bool(self._gpu_layers)
        _log.clear()
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise self._failure("cannot make a context for")
        self._room = tokens, sequences

    def _decode(self, ids: NDArray[np.int64], position: int, *, every: bool) -> NDArray[np.float32]:
        """Run ``ids`` from ``position`` on; return logits of all of them, or of the last: (1 or n, vocabulary).

        The array is the library's own and valid until the next call.
        """
        last = len(ids) - 1
        return self._decode_rows([_Row(int(t), position + i, PREFIX, every or i == last) for i, t in enumerate(ids)])

    def _decode_rows(self, rows: Sequence[_Row]) -> NDArray[np.float32]:
        """Run tokens; return the logits of those wanted, in order: (wanted, vocabulary).

        The array is the library's own and valid until the next call.
        """
        require_known(np.array([row.token for row in rows]), self.vocab_size, self.path)
        batch = llama_cpp.llama_batch_init(len(rows), 0, 1)
        try:
            batch.n_tokens = len(rows)
            for i, row in enumerate(rows):
                batch.token[i], batch.pos[i] = row.token, row.position
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, row.sequence
                batch.logits[i] = row.wanted
            _log.clear()
            if code := llama_cpp.llama_decode(self._context, batch):
                raise self._failure(f"llama_decode returned {code} for")
        finally:
            llama_cpp.llama_batch_free(batch)
        wanted = [i for i, row in enumerate(rows) if row.wanted]
        if not wanted:
            return np.empty((0, self.vocab_size), dtype=np.float32)
        first = llama_cpp.llama_get_logits_ith(self._context, wanted[0])
        if not first:
            raise self._failure("no logits from")
        return np.ctypeslib.as_array(first, shape=(len(wanted), self.vocab_size))

    def _free_context(self) -> None:
        if self._context:
            llama_cpp.llama_free(self._context)
            self._context, self._room = None, (0, 0)

    def _failure(self, what: str) -> RuntimeFailure:
        lines = [line for line in _log if "failed to load model" not in line]  # the callers' echoes of the cause
        said = f": {'; '.join(lines)}" if lines else ""
        return RuntimeFailure(
            f"llama.cpp: {what} {self.path}{said}", "The file is damaged, or newer than this llama.cpp."
        )


def open_runtime(path: Path, *, gpu_layers: int = 0, threads: int | None = None) -> LlamaCppRuntime:
    """Load a GGUF file; arguments and errors are those of ``LlamaCppRuntime``."""
    return LlamaCppRuntime(path, gpu_layers=gpu_layers, threads=threads)


def devices() -> list[str]:
    """Return where llama.cpp can compute."""
    return [f"cpu ({usable_cores()} threads)", *(["gpu"] if llama_cpp.llama_supports_gpu_offload() else [])]
