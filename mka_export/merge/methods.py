"""The methods by name: how layers are chosen, and how those become one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from mka_export.merge import choose, fuse
from mka_export.merge.choose import Settings
from mka_export.merge.compete import ROUNDS, compete, competition_bytes
from mka_export.merge.damage import least_damage
from mka_export.merge.fuse import Fuse
from mka_export.merge.steps import Choice
from mka_export.merge.views import Views
from mka_export.models.outline import Outline


@dataclass(frozen=True)
class Method:
    """A way to make a model shallower.

    Attributes:
        choose: which layers, one merge after another.
        fuse: what becomes of them.
        memory: (model, calibration tokens) -> bytes that ``fuse`` holds at most.
        protect: this many early layers take no part unless asked otherwise.
        measured: it compares layers by ``--measure``, on a ``--schedule``.
    """

    choose: Callable[[Settings, Views], Iterator[Choice]]
    fuse: Fuse
    memory: Callable[[Outline, int], int]
    protect: int = 0
    measured: bool = False

    def stepwise(self, schedule: str) -> bool:
        """Each merge takes one layer away, and follows from those before it, however many are to come."""
        return self.choose is choose.least_loss or (self.choose is choose.similar_pairs and schedule == "iterative")


METHODS = {
    "mka": Method(
        partial(least_damage, compete), partial(compete, rounds=ROUNDS), competition_bytes, protect=4, measured=True
    ),
    "mka-paper": Method(choose.similar_pairs, fuse.average, fuse.layers_bytes, protect=4, measured=True),
    "tail": Method(choose.tail, fuse.keep, fuse.layers_bytes),
    "shortgpt": Method(choose.least_influence, fuse.keep, fuse.layers_bytes),
    "pruneme": Method(choose.closest_block, fuse.keep, fuse.layers_bytes),
    "sleb": Method(choose.least_loss, fuse.keep, fuse.layers_bytes),
    "laco": Method(choose.collapsible, fuse.collapse, fuse.layers_bytes),
    "replaceme": Method(choose.alike_block, fuse.linear_map, fuse.map_bytes),
}
