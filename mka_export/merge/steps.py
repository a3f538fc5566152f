"""One merge, by the original layers that take part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mka_export.data import value_of


@dataclass(frozen=True)
class Step:
    """One merge of a layer and its neighbours above.

    Attributes:
        lower: the span [first, last] of original layers that the layer stood for.
        upper: that of the neighbours: one, or several, whose spans follow each other.
        similarity: what spoke for them when they were chosen, by the method's own measure; None for none.
        alpha: the weight of the lower layer in an average.
        figures: what the method reports.
    """

    lower: list[int]
    upper: list[int]
    similarity: float | None
    alpha: float
    figures: Mapping[str, float] = field(default_factory=dict)

    def places(self, spans: Sequence[list[int]]) -> tuple[int, int]:
        """Return the positions of the lower and of the highest upper layer among all, given by their spans.

        Raises:
            ValueError: they are not there, or no neighbours.
        """
        ends = [span[1] for span in spans]
        if self.lower in spans and self.upper[1] in ends:
            position, last = spans.index(self.lower), ends.index(self.upper[1])
            if position < last and spans[position + 1][0] == self.upper[0]:
                return position, last
        raise ValueError(f"{self.lower} and {self.upper} are not neighbours then")


def merge_spans(spans: list[list[int]], position: int, last: int) -> None:
    """Make one span of those from ``position`` to ``last``."""
    spans[position : last + 1] = [[spans[position][0], spans[last][1]]]


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
    figures = value_of(data, "figures", dict) if "figures" in data else {}
    figures = {name: value_of(figures, name, float) for name in figures}
    similarity = None if data.get("similarity", 0) is None else value_of(data, "similarity", float)
    return Step(lower, upper, similarity, alpha, figures)
