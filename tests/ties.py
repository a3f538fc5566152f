"""Two greedy continuations of one text, by two programs that round differently."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mka_export.parity.runtimes import Runtime

NEAR = 0.05  # nats


def require_same_or_a_tie(
    runtime: Runtime, prompt: Sequence[int], theirs: Sequence[int], mine: Sequence[int], near: float = NEAR
) -> None:
    """Assert that two continuations are the same until two tokens are about as likely, by what ``runtime`` says.

    ``near``: how far their log-probabilities may be apart, in nats.
    """
    differs = next((i for i, (a, b) in enumerate(zip(theirs, mine, strict=False)) if a != b), None)
    if differs is None:
        return
    (rows,) = runtime.log_probs(np.array([[*prompt, *mine[:differs]]]))
    margin = abs(float(rows[-1][theirs[differs]] - rows[-1][mine[differs]]))
    text = runtime.detokenize(prompt)
    print(f"{text!r}: other words from token {differs} of {len(mine)} on, a tie within {margin:.4f} nats")
    assert margin < near
