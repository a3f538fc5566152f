"""Does the artifact behave? Its chat template, the ends of its texts, and whether it repeats itself.

Probabilities on given text do not tell these: a file may predict every token as the original does, and still be asked in
another format, talk on behind its answer, or go round in circles once it reads what it wrote itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mka_export.errors import RuntimeFailure
from mka_export.models.chat import Conversation, Rendered
from mka_export.parity.runtimes import Runtime
from mka_export.parity.statistics import Interval, bootstrap_means
from mka_export.parity.tokenizer_check import first_difference
from mka_export.parity.verdict import Outcome, worst

NGRAM = 4  # tokens: seq-rep-4 is what the paper reports
# By how much more of its runs an artifact may repeat before it counts. Fewer layers or bits make a small model repeat itself
# somewhat more, and text that reads well is none the worse for it: of SmolLM2-135M's runs 0.08 are repeated, in Q4_K_M 0.18,
# with a tenth of the layers merged besides 0.19, and with the last fifth of them cut off, which ruins it, 0.60.
MARGIN = 0.25
_SHOWN = 30  # characters on each side of where two texts part


@dataclass(frozen=True)
class SmokeCheck:
    """One thing that was looked at, and what came of it.

    Attributes:
        name: ``chat_template``, ``end_of_text`` or ``repetition``.
        verdict: ``fail`` makes the artifact fail; ``inconclusive`` is shown and does not decide.
        reason: the same in a sentence.
    """

    name: str
    verdict: Outcome
    reason: str


@dataclass(frozen=True)
class Smoke:
    """All that was looked at.

    Attributes:
        checks: one for each thing.
        original: mean repetition rate of the original's continuations.
        artifact: of the artifact's.
    """

    checks: tuple[SmokeCheck, ...]
    original: float
    artifact: float

    @property
    def failures(self) -> list[str]:
        """The sentences for what failed."""
        return [check.reason for check in self.checks if check.verdict == "fail"]

    def to_dict(self) -> dict[str, Any]:
        """Return the field ``smoke`` of a report's target."""
        return {
            "verdict": worst(check.verdict for check in self.checks),
            "checks": [asdict(check) for check in self.checks],
            "repetition": {"original": self.original, "artifact": self.artifact},
        }


def smoke(
    chat_template: SmokeCheck,
    end_of_text: SmokeCheck,
    original: Sequence[Sequence[int]],
    artifact: Sequence[Sequence[int]],
) -> Smoke:
    """Put together what ``check_chat_template`` and ``check_ends`` found, and how the models went on.

    Args:
        original: the original's greedy continuation of each prompt, ids.
        artifact: the artifact's of the same prompts, of the same length at most.
    """
    rates = np.array([[repetition(one), repetition(other)] for one, other in zip(original, artifact, strict=True)])
    (more,) = bootstrap_means(rates[:, 1:] - rates[:, :1])
    before, after = (float(rate) for rate in rates.mean(axis=0))
    return Smoke((chat_template, end_of_text, _check_repetition(before, after, more, len(rates))), before, after)


def repetition(ids: Sequence[int], n: int = NGRAM) -> float:
    """Return the share of a continuation's n-grams that stood in it before: 1 - unique n-grams / n-grams.

    This is seq-rep-n of arXiv 1908.04319, section 3. A text that ends before it has an n-gram repeats nothing.
    """
    ngrams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def check_chat_template(original: Runtime, artifact: Runtime, conversations: Sequence[Conversation]) -> SmokeCheck:
    """Check that the artifact's own template makes of each conversation what the original's does: text, and ids.

    A conversation that the original's template refuses (some know no system's turn) is left out.
    """
    name = "chat_template"
    try:
        expected = original.render_chats(conversations)
    except RuntimeFailure as error:
        reason = f"The original's own chat template cannot be used, so nothing is compared: {error}"
        return SmokeCheck(name, "inconclusive", reason)
    if expected is None:
        return SmokeCheck(name, "pass", "The original has no chat template, so there is nothing to compare.")
    return SmokeCheck(name, *_compare_chats(expected, original, artifact, conversations))


def _compare_chats(
    expected: Sequence[Rendered], original: Runtime, artifact: Runtime, conversations: Sequence[Conversation]
) -> tuple[Outcome, str]:
    try:
        found = artifact.render_chats(conversations)
    except RuntimeFailure as error:
        return "fail", f"The artifact's chat template cannot be used: {error}"
    if found is None:
        return "fail", "The artifact has no chat template, and the original has one."
    pairs = [(one, other) for one, other in zip(expected, found, strict=True) if one.error is None]
    if not pairs:
        why = expected[0].error
        return (
            "inconclusive",
            f"The original's own chat template renders no conversation, so nothing is compared: {why}",
        )
    wrong = _first_parted(pairs) or first_difference(original, artifact, (one.text for one, _ in pairs))
    if wrong:
        return "fail", f"The artifact reads a conversation otherwise than the original: {wrong}."
    return (
        "pass",
        f"The artifact's chat template renders {len(pairs)} conversations as the original's does, to the same ids.",
    )


def check_ends(original: Runtime, ends: frozenset[int], ordinary: NDArray[np.int64]) -> SmokeCheck:
    """Check that an artifact stops where the original does, and not in the middle of a text.

    Args:
        ends: ids that end a text of the artifact.
        ordinary: ids of text without ends, of any shape. Runtimes take more ids for ends than the original does, by how
            they are spelled: that is well, unless text holds one.
    """
    name = "end_of_text"
    known = {i for i in original.ends if 0 <= i < original.vocab_size}
    if missing := sorted(known - ends):
        reason = f"The artifact does not stop at {_spelled(original, missing)}, which ends a text of the original."
        return SmokeCheck(name, "fail", reason)
    if early := sorted(ends - known & {int(i) for i in np.unique(ordinary)}):
        reason = f"The artifact stops at {_spelled(original, early)}, which stands in ordinary text of the original."
        return SmokeCheck(name, "fail", reason)
    if not known:
        return SmokeCheck(name, "pass", "The original names no end of a text, so there is nothing to compare.")
    return SmokeCheck(
        name, "pass", f"The artifact stops where the original does, at {_spelled(original, sorted(known))}."
    )


def _check_repetition(before: float, after: float, more: Interval, prompts: int) -> SmokeCheck:
    verdict: Outcome = "pass" if more.high <= MARGIN else "fail" if more.low > MARGIN else "inconclusive"
    said = {"pass": "no more than", "fail": "clearly more than", "inconclusive": "perhaps more than"}[verdict]
    spread = f"95 % interval {more.low:+.3f} to {more.high:+.3f}" if np.isfinite(more.low) else "no interval"
    reason = (
        f"The artifact repeats itself {said} the original does, give or take {MARGIN:g}: {after:.3f} of its runs of "
        f"{NGRAM} tokens are repeated, {before:.3f} of the original's (difference over {prompts} prompts: {spread})."
    )
    return SmokeCheck("repetition", verdict, reason)


def _first_parted(pairs: Iterable[tuple[Rendered, Rendered]]) -> str | None:
    """Say how the first conversation came out that came out otherwise; None if all are the same."""
    for expected, found in pairs:
        if found.error is not None:
            return f"its chat template cannot render it ({found.error})"
        if found.text != expected.text:
            both = zip(expected.text, found.text, strict=False)
            at = next((i for i, (a, b) in enumerate(both) if a != b), min(len(expected.text), len(found.text)))
            part = slice(max(0, at - _SHOWN), at + _SHOWN)
            return f"its chat template makes {found.text[part]!r}, the original's {expected.text[part]!r}"
    return None


def _spelled(runtime: Runtime, ids: Iterable[int]) -> str:
    return ", ".join(f"{i} ({runtime.detokenize([i])!r})" for i in ids)
