"""Memory that is freed, given back to the system."""

from __future__ import annotations

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def return_freed_blocks(nbytes: int) -> None:
    """Have the C library return blocks of ``nbytes`` and more as soon as they are freed.

    glibc otherwise raises that size to 32 MB as it goes, and keeps what is smaller, in pieces that fit nothing: measured
    on layers of 54 M weights, 2.4 GB at most instead of 1.2 with a megabyte. New pages have to be cleared, which with
    such layers is not noticed, and with those of SmolLM2-135M takes 45 % longer (6 % with 16 MB). Elsewhere than with
    glibc nothing is done.
    """
    with contextlib.suppress(AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, nbytes)
        library.mallopt(_M_TRIM_THRESHOLD, nbytes)
