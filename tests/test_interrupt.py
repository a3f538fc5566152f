"""Ctrl-C during work that Python cannot break off."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

SCRIPT = """
import ctypes, sys, threading
from mka_export.interrupt import obeyed

def say():
    print("how to go on", file=sys.stderr)

libc = ctypes.CDLL(None)
with obeyed(say):
    print("ready", flush=True)
    {work}
"""
UNINTERRUPTIBLE = "import numpy as np; a = np.ones((6000, 6000)); [a @ a for _ in range(10000)]"


SWALLOWED = "try: threading.Event().wait(60)\n    except KeyboardInterrupt: raise ValueError('what C code made of it') from None"

HALF_MADE = "half = type('Half', (), {'__del__': lambda self: self.lock})(); threading.Event().wait(60)"


@pytest.mark.parametrize(
    "work", ["threading.Event().wait(60)", SWALLOWED, HALF_MADE, UNINTERRUPTIBLE, "while libc.sleep(20): pass"]
)
def test_it_ends_within_seconds_and_says_so_once(work):
    command = [sys.executable, "-c", SCRIPT.format(work=work)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.3)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert time.monotonic() - start < 10  # on a busy machine; two seconds on an idle one
    assert process.returncode == 130
    assert errors == "how to go on\n"


def test_nothing_is_left_behind():
    from mka_export.interrupt import obeyed

    threads, wakeup, handler = threading.active_count(), signal.set_wakeup_fd(-1), signal.getsignal(signal.SIGINT)
    signal.set_wakeup_fd(wakeup)
    with pytest.raises(ZeroDivisionError), obeyed(lambda: None):
        raise ZeroDivisionError
    assert threading.active_count() == threads
    assert signal.getsignal(signal.SIGINT) == handler
    assert signal.set_wakeup_fd(wakeup) == wakeup


def test_elsewhere_than_in_the_main_thread_it_does_nothing():
    from mka_export.interrupt import obeyed

    done = []

    def run() -> None:
        with obeyed(lambda: None):
            done.append(1)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert done == [1]
