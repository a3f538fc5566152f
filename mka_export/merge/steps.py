"""One merge, by the original layers that take part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mka_export.data import value_of


@dataclass(frozen=True)
class Choice:
    """One merge to do, by places in the model under merge.

    Attributes:
        position: of the lowest layer.
        last: of the highest.
        similarity: what spoke for it, by the method's own measure; None where nothing was measured.
        alpha: the lower layer's weight in an average.
        attention: the original layer whose attention the merged one has; by default that of the lowest.
    """

    position: int
    last: int
    similarity: float | None = None
    alpha: float = 1.0
    attention: int | None = None

    def step(self, spans: Sequence[list[int]], attention: int) -> Step:
        """Return the merge by the original layers that take part: the inverse of ``Step.choice``.

        Args:
            spans: of the layers of the model under merge.
            attention: the original layer whose attention stays.
        """
        upper = [spans[self.position + 1][0], spans[self.last][1]]
        return Step(spans[self.position], upper, self.similarity, self.alpha, attention)


@dataclass(frozen=True)
class Step:
    """One merge of a layer and its neighbours above.

    Attributes:
        lower: the span [first, last] of original layers that the layer stood for.
        upper: that of the neighbours: one, or several, whose spans follow each other.
        similarity: what spoke for them when they were chosen, by the method's own measure; None for none.
        alpha: the weight of the lower layer in an average.
        attention: the original layer whose attention stays.
        figures: what the method reports.
    """

    lower: list[int]
    upper: list[int]
    similarity: float | None
    alpha: float
    attention: int
    figures: Mapping[str, float] = field(default_factory=dict)

    def choice(self, spans: Sequence[list[int]]) -> Choice:
        """Return the merge as it is to be done where a model has layers of these ``spans``.

        Raises:
            ValueError: those that take part are not among them, or no neighbours.
        """
        ends = [span[1] for span in spans]
        if self.lower in spans and self.upper[1] in ends:
            position, last = spans.index(self.lower), ends.index(self.upper[1])
            if position < last and spans[position + 1][0] == self.upper[0]:
                return Choice(position, last, self.similarity, self.alpha, self.attention)
        raise ValueError(f"{self.lower} and {self.upper} are not neighbours then")


def merge_spans(spans: list[list[int]], choice: Choice) -> None:
    """Make one span of those that take part in a merge."""
    spans[choice.position : choice.last + 1] = [[spans[choice.position][0], spans[choice.last][1]]]


def step_from(data: object) -> Step:
    """Return a step as it stands in a file.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(data, dict):
        raise ValueError(f"the step {data!r} is no table")
    lower, upper = (value_of(data, key, list) for key in ("lower", "upper"))
    if [type(layer) for layer in (*lower, *upper)] != [int] * 4 or len(lower) != 2:
        raise ValueError(f"a step merges {lower} and {upper}, which are no layers")
    if not 0.0 <= (alpha := value_of(data, "alpha", float)) <= 1.0:
        raise ValueError(f"alpha = {alpha} is not between 0 and 1")
    if not lower[0] <= (attention := value_of(data, "attention", int)) <= upper[1]:
        raise ValueError(f"attention = {attention} is none of the layers from {lower[0]} to {upper[1]}")
    figures = value_of(data, "figures", dict) if "figures" in data else {}
    figures = {name: value_of(figures, name, float) for name in figures}
    similarity = None if data.get("similarity", 0) is None else value_of(data, "similarity", float)
    return Step(lower, upper, similarity, alpha, attention, figures)
