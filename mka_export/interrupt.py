"""Ctrl-C that is obeyed within seconds, also while a library computes and Python does not get its turn."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

GRACE = 1.5  # seconds for an orderly end
EXIT_CODE = 130  # 128 + SIGINT, as shells have it


@contextmanager
def obeyed(say: Callable[[], None]) -> Iterator[None]:
    """Turn SIGINT while the block runs into an exit with code 130, after ``say``.

    Python raises KeyboardInterrupt only between two of its own steps, and one matrix product of a large model can
    take minutes. So where the block has not ended GRACE seconds after the signal, the process ends as if it were
    killed, which the workspace is made for.

    Only in the main thread: elsewhere signals never arrive.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard, tell = os.pipe()
    os.set_blocking(tell, False)
    previous = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    interrupted, ended = threading.Event(), threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        # What it leaves half-made, in an import for one, complains when it is freed.
        sys.unraisablehook = lambda _: None
        signal.default_int_handler(number, frame)

    handler = signal.signal(signal.SIGINT, interrupt)
    watcher = threading.Thread(target=_watch, args=(heard, ended, say), daemon=True)
    watcher.start()
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        if not (interrupted.is_set() or isinstance(error, KeyboardInterrupt)):
            raise
        say()  # also of another error: C code that calls Python may make one of the interrupt, as safetensors does
        sys.exit(EXIT_CODE)
    finally:
        ended.set()
        signal.signal(signal.SIGINT, handler)
        signal.set_wakeup_fd(previous)
        os.close(tell)  # the watcher reads the end of the pipe
        watcher.join()
        os.close(heard)


def _watch(heard: int, ended: threading.Event, say: Callable[[], None]) -> None:
    while number := os.read(heard, 1):
        if number[0] == signal.SIGINT and not ended.wait(GRACE):
            if sys.stderr.isatty():
                sys.stderr.write("\x1b[?25h\n")  # a progress bar hides the cursor
            say()
            sys.stderr.flush()
            os._exit(EXIT_CODE)
