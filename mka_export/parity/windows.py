"""The token windows that every runtime is measured on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mka_export.errors import MkaError, UsageError
from mka_export.parity.runtimes import Windows


def evaluation_windows(ids: Sequence[int], tokens: int, count: int, bos: int | None) -> Windows:
    """Cut ``count`` windows of ``tokens`` tokens out of ``ids``, evenly spread, none overlapping another.

    The first starts at the text's start, the last ends at its end (a single one starts at the start). Where
    the tokenizer puts ``bos`` before every text, each window is BOS and ``tokens - 1`` ids.

    Returns:
        (count, tokens) int64.

    Raises:
        UsageError: less than one window, or windows without a token to predict.
        MkaError: the text holds fewer windows than asked for.
    """
    if count < 1 or tokens < 2:
        raise UsageError(f"{count} windows of {tokens} tokens", "Ask for at least one window of two tokens.")
    lead = [] if bos is None else [bos]
    body = tokens - len(lead)
    fitting = len(ids) // body
    if fitting < count:
        raise MkaError(
            f"the evaluation text has {len(ids)} tokens: {fitting} windows of {tokens} fit, {count} are wanted",
            "Give a longer text with --text, or ask for fewer or shorter windows.",
        )
    spare = len(ids) - body
    starts = [spare * i // max(1, count - 1) for i in range(count)]
    return np.array([[*lead, *ids[start : start + body]] for start in starts], dtype=np.int64)
