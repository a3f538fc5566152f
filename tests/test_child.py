"""Work in another process: what becomes of it when that process fails, and of that process when we do."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection

import psutil
import pytest

from mka_export.child import Child
from mka_export.errors import RuntimeFailure, UnsupportedError


def echo(connection: Connection, *args: object) -> None:
    connection.send(args)
    while True:
        connection.send(connection.recv())


def abort(connection: Connection) -> None:
    print("assertion failed: n_layer > 0", file=sys.stderr, flush=True)
    os.abort()


def dereference_null(connection: Connection) -> None:
    ctypes.string_at(0)


def killed_for_memory(connection: Connection) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave(connection: Connection) -> None:
    os._exit(7)


def refuse(connection: Connection) -> None:
    raise UnsupportedError("a thing", "Do another.")


def stumble(connection: Connection) -> None:
    raise ZeroDivisionError("of nothing")


def sleep(connection: Connection) -> None:
    time.sleep(600)


def hold_a_lock(connection: Connection) -> None:
    lock = multiprocessing.RLock()  # as tqdm does
    connection.send("held")
    time.sleep(600)
    lock.acquire()


def test_messages_go_both_ways() -> None:
    with Child("echo", echo, 1, "two") as child:
        assert child.receive() == (1, "two")
        child.send({"three": 4})
        assert child.receive() == {"three": 4}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (abort, r"the work crashed \(SIGABRT\): .*n_layer > 0"),
        (dereference_null, r"the work crashed \(SIGSEGV\)"),
        (killed_for_memory, r"the work crashed \(SIGKILL\). The system may be short of memory"),
        (leave, "the work ended with exit code 7"),
        (stumble, "ZeroDivisionError: of nothing"),
    ],
)
def test_a_failure_over_there_is_one_line_here(function, message) -> None:
    with Child("the work", function) as child, pytest.raises(RuntimeFailure, match=message):
        child.receive()


def test_our_own_errors_come_back_as_they_are() -> None:
    with Child("the work", refuse) as child, pytest.raises(UnsupportedError) as caught:
        child.receive()
    assert (caught.value.what, caught.value.remedy) == ("a thing", "Do another.")


def test_a_silent_process_is_given_up() -> None:
    start = time.monotonic()
    with Child("the work", sleep, patience=0.2) as child, pytest.raises(RuntimeFailure, match="no sign of life"):
        child.receive()
    assert time.monotonic() - start < 60


def test_nothing_is_left_after_the_block() -> None:
    with Child("the work", sleep):
        (process,) = [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]
    assert not process.is_running()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the locks of a spawned process have names")
def test_locks_of_a_process_that_is_ended_are_not_complained_about() -> None:
    script = (
        "from mka_export.child import Child\n"
        "from tests.test_child import hold_a_lock\n"
        "with Child('the work', hold_a_lock) as child:\n"
        "    child.receive()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stderr == ""


def test_it_dies_with_its_parent() -> None:
    script = (
        "from mka_export.child import Child\n"
        "from tests.test_child import echo\n"
        "child = Child('echo', echo)\n"
        "child.receive()\n"
        "print(child._process.pid, flush=True)\n"
        "import time; time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    child.wait(timeout=30)
