"""A runtime in a process of its own: an artifact that makes it crash or hang is that artifact's failure only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from mka_export.child import Child
from mka_export.models.chat import PATIENCE, Conversation, Rendered
from mka_export.parity.runtimes import RUNTIMES, LogProbs, Prefixed, Runtime, Windows

ROWS = 128  # of log-probabilities in one message: 78 MB at a vocabulary of 152 000


class IsolatedRuntime:
    """Any runtime, by messages.

    Args:
        opener: module-level function that opens it, ``(path, **options)``.
        path: the artifact.
        options: passed on.

    Raises:
        RuntimeFailure: the runtime cannot load the artifact, crashes or hangs.
        UsageError: as the runtime raises it.
    """

    def __init__(
        self,
        opener: Callable[..., Runtime],
        path: Path,
        options: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        self._child = Child(f"the runtime of {path}", _serve, opener, path, dict(options))
        try:
            self.name, self.device, self.vocab_size, self.ends = self._child.receive()
        except BaseException:
            self._child.close()
            raise

    def tokenize(self, text: str) -> list[int]:
        """Turn text into ids, as the runtime does."""
        ids: list[int] = self._call("tokenize", text)
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        """Turn ids into text, as the runtime does."""
        return str(self._call("detokenize", ids))

    def log_probs(self, windows: Windows) -> Iterator[LogProbs]:
        """Yield, window by window, (tokens, vocabulary) log-probabilities; row t is for token t + 1."""
        for window in windows:
            self._child.send(("log_probs", window[None]))
            yield self._rows(len(window))

    def next_log_probs(self, texts: Sequence[Prefixed], tokens: Sequence[int]) -> Iterator[LogProbs]:
        """Yield the log-probabilities of ``tokens`` after each text, as the runtime does, some texts at a time."""
        for text in texts:
            self._child.send(("next_log_probs", text, tokens))
            left = len(text.rests)
            while left:
                piece: LogProbs = self._child.receive()
                left -= len(piece)
                yield piece

    def rest_log_probs(self, texts: Sequence[Prefixed]) -> Iterator[LogProbs]:
        """Yield, text by text, (tokens, vocabulary) log-probabilities of how it goes on, as the runtime does."""
        for text in texts:
            self._child.send(("rest_log_probs", [text]))
            for rest in text.rests:
                yield self._rows(len(rest))

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Continue each prompt greedily, as the runtime does."""
        return [self._call("generate", [prompt], max_new_tokens)[0] for prompt in prompts]

    def render_chats(self, conversations: Sequence[Conversation]) -> list[Rendered] | None:
        """Render conversations, as the runtime does."""
        self._child.send(("render_chats", conversations))
        rendered: list[Rendered] | None = self._child.receive(PATIENCE)
        return rendered

    def close(self) -> None:
        """End the process."""
        self._child.close()

    def _rows(self, tokens: int) -> LogProbs:
        out = np.empty((tokens, self.vocab_size), dtype=np.float32)
        for start in range(0, tokens, ROWS):
            out[start : start + ROWS] = self._child.receive()
        return out

    def _call(self, method: str, *args: object) -> Any:
        self._child.send((method, *args))
        return self._child.receive()


def usable_devices(name: str) -> list[str]:
    """Return where the runtime called ``name`` can compute; its library is loaded in a process of its own.

    Raises:
        RuntimeFailure: it is not installed, or crashes.
    """
    with Child(name, _send_devices, RUNTIMES[name]) as child:
        devices: list[str] = child.receive()
        return devices


def _send_devices(connection: Connection, module: str) -> None:
    connection.send(import_module(module).devices())


def _serve(connection: Connection, opener: Callable[..., Runtime], path: Path, options: dict[str, object]) -> None:
    runtime = opener(path, **options)
    connection.send((runtime.name, runtime.device, runtime.vocab_size, runtime.ends))
    while True:
        method, *args = connection.recv()
        if method in ("log_probs", "rest_log_probs"):
            for found in getattr(runtime, method)(args[0]):
                for start in range(0, len(found), ROWS):
                    connection.send(found[start : start + ROWS])
        elif method == "next_log_probs":
            for piece in runtime.next_log_probs([args[0]], args[1]):
                connection.send(piece)
        else:
            connection.send(getattr(runtime, method)(*args))
