"""Files from strangers are accepted or refused in one line, in bounded time and memory, whatever their bytes."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import mutate
from readers import READERS, limit_memory, refusal, sound

CORPUS = Path(__file__).parent / "corpus"
SECONDS = 10.0  # of one file; the slowest takes a tenth of one


class TooSlow(BaseException):
    """Not an Exception, which readers may take for a complaint of a library."""


@contextmanager
def limited_time() -> Iterator[None]:
    """Raise ``TooSlow`` if the block takes longer than ``SECONDS``."""

    def ring(*_: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True, scope="module")
def limited_memory() -> Iterator[None]:
    for kind in READERS:  # what is imported late counts as before
        for data in sound(kind):
            refusal(kind, data)
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit_memory()
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("kind", READERS)
def test_sound_files_are_accepted(kind: str) -> None:
    assert [refusal(kind, data) for data in sound(kind)] == [None] * len(sound(kind))


@pytest.mark.parametrize("kind", READERS)
def test_damaged_files_are_accepted_or_refused(kind: str) -> None:
    outcomes = []

    @settings(max_examples=200, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(sound(kind)), st.randoms(use_true_random=False))
    def check(data: bytes, rng: Random) -> None:
        with limited_time():
            outcomes.append(refusal(kind, mutate(kind, data, rng)))

    check()
    assert any(outcomes)  # the damage reaches something


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_was_found(path: Path) -> None:
    with limited_time():
        assert refusal(path.parent.name, path.read_bytes()) is not None
