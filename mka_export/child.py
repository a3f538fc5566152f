"""Work in a process of its own, so that a C library that crashes or hangs takes nothing else with it."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from mka_export.errors import MkaError, RuntimeFailure

PATIENCE = 600.0  # seconds without a message after which a child is taken to hang
_LAST_WORDS = 400  # characters of its stderr that are shown


class Child:
    """A function that runs in another process, and the line to it.

    Use as a context manager: the process does not outlive the block, nor its parent.

    Args:
        what: what it does, for messages.
        function: module-level ``(connection, *args) -> None``; what it sends arrives in ``receive``, an error
            it raises is raised there.
        args: sent to the process, and so pickled.
        patience: seconds to wait for a message.
    """

    def __init__(self, what: str, function: Callable[..., None], *args: object, patience: float = PATIENCE) -> None:
        self.what, self.patience = what, patience
        context = multiprocessing.get_context("spawn")
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close); it has no name that could stay
        self._connection, other = context.Pipe()
        # A connection is what multiprocessing knows to pass on; this one is to the file.
        log = Connection(os.dup(self._stderr.fileno()), readable=False)
        self._process = context.Process(target=_main, args=(other, log, os.getpid(), function, args), daemon=True)
        self._process.start()
        other.close()
        log.close()

    def send(self, message: object) -> None:
        """Send a message; that the process is gone shows in the next ``receive``."""
        with contextlib.suppress(OSError):
            self._connection.send(message)

    def receive(self, patience: float | None = None) -> Any:
        """Wait for the next message, for ``patience`` seconds, or as long as always.

        Raises:
            MkaError: what the function raised.
            RuntimeFailure: the process is gone, or silent for longer than ``patience``.
        """
        patience = patience or self.patience
        if not self._connection.poll(patience):
            self.close()
            raise RuntimeFailure(f"{self.what}: no sign of life for {patience:.0f} seconds; stopped")
        try:
            message = self._connection.recv()
        except (EOFError, OSError):
            raise self._gone() from None
        if isinstance(message, MkaError):
            raise message
        return message

    def finish(self) -> None:
        """Wait until the function, which has said all, returns: a process that is ended leaves its semaphores behind."""
        self._process.join(self.patience)

    def close(self) -> None:
        """End the process, at once and whatever it is doing."""
        self._process.kill()
        self._process.join()
        self._connection.close()
        self._stderr.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _gone(self) -> RuntimeFailure:
        self._process.join(self.patience)
        code = self._process.exitcode or 0
        how = f"crashed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
        self._stderr.seek(0)
        words = " ".join(self._stderr.read().decode("utf-8", "replace").split())
        said = f": {words[-_LAST_WORDS:]}" if words else ""
        remedy = "The system may be short of memory." if code == -signal.SIGKILL else ""
        return RuntimeFailure(f"{self.what} {how}{said}", remedy)


def _main(
    connection: Connection, log: Connection, parent: int, function: Callable[..., None], args: tuple[object, ...]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    _die_with(parent)
    if sys.platform == "linux":  # so that locks have no names, which a process that is ended would leave behind
        multiprocessing.set_start_method("fork", force=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ["GGML_NO_BACKTRACE"] = "1"  # or a debugger is started on a crash
    os.dup2(log.fileno(), sys.stderr.fileno())
    try:
        function(connection, *args)
    except MkaError as error:
        connection.send(error)
    except Exception as error:
        connection.send(RuntimeFailure(f"{type(error).__name__}: {error}"))


def _die_with(parent: int) -> None:
    """Have Linux kill this process when its parent dies, however that comes about."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG in linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
