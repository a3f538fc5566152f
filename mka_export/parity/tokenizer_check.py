"""The first question of parity: does the artifact read text as the original does?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import regex

from mka_export.parity.runtimes import MISREAD, Runtime

_SHOWN = 4  # ids shown on each side of a difference


@dataclass(frozen=True)
class TokenDifference:
    """A text that two tokenizers turn into different ids.

    Attributes:
        text: the whole text.
        position: index of the first id that differs, or where the shorter list ends.
        reference: the original's ids.
        artifact: the artifact's ids.
    """

    text: str
    position: int
    reference: tuple[int, ...]
    artifact: tuple[int, ...]

    def __str__(self) -> str:
        shown = slice(max(0, self.position - 1), self.position + _SHOWN)
        text = self.text if len(self.text) <= 60 else self.text[:60] + "…"
        return (
            f"token ids of {text!r} differ at position {self.position}: "
            f"original {list(self.reference[shown])}, artifact {list(self.artifact[shown])}"
        )


def without_misread(runtime: str, texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """Cut out of ``texts`` what a runtime is known to read otherwise than it should.

    Returns:
        the pieces that are left, and what was cut out, each once.
    """
    if runtime not in MISREAD:
        return list(texts), []
    pattern, pieces, odd = regex.compile(MISREAD[runtime]), list[str](), dict[str, None]()
    for text in texts:
        pieces += filter(None, pattern.split(text))
        odd |= dict.fromkeys(pattern.findall(text))
    return pieces, list(odd)


def first_difference(reference: Runtime, artifact: Runtime, texts: Iterable[str]) -> TokenDifference | None:
    """Return the first of ``texts`` that the two runtimes turn into different ids, or None.

    Any difference makes every other figure meaningless, so it is a hard failure of the artifact.
    """
    for text in texts:
        expected, found = reference.tokenize(text), artifact.tokenize(text)
        if expected != found:
            same = (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b)
            position = next(same, min(len(expected), len(found)))
            return TokenDifference(text, position, tuple(expected), tuple(found))
    return None
