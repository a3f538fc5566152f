"""``mka-export serve`` from its first line to Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
from page import MAIN, fake_out, fake_setup, serving


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    fake_setup(tmp_path / "cache")
    monkeypatch.setenv("MKA_EXPORT_CACHE", str(tmp_path / "cache"))
    return fake_out(tmp_path / "out")


def test_it_prints_its_address_and_ends_with_ctrl_c(out):
    with serving(out) as (process, url):
        assert url.startswith("http://127.0.0.1:")
        with urlopen(url) as answer:
            assert answer.status == 200
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=30)
    assert time.monotonic() - start < 10
    assert (process.returncode, rest) == (0, "")
    assert errors == "  a b.gguf\n  a-int4\nCtrl-C ends it.\n"


def test_open_to_the_network(out):
    with serving(out, "--host", "0.0.0.0") as (process, url):
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    address = urlsplit(url).hostname or ""
    assert address != "0.0.0.0"
    assert address.startswith("127.") != ("--tls" in errors)


def test_help_is_instant():
    command = [sys.executable, "-X", "importtime", "-c", MAIN, "serve", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--setup" in done.stdout
    assert not any(name in done.stderr for name in ("http.server", "torch", "trustme", "psutil"))
