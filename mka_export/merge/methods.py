"""The methods by name: how layers are chosen, and how those become one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mka_export.merge import choose, fuse
from mka_export.merge.choose import Choice, Settings, Views
from mka_export.merge.compete import compete, competition_bytes
from mka_export.merge.fuse import Fuse
from mka_export.models.outline import Outline


@dataclass(frozen=True)
class Method:
    """A way to make a model shallower.

    Attributes:
        about: one line for people.
        choose: which layers, one merge after another.
        fuse: what becomes of them.
        memory: (model, calibration tokens) -> bytes that ``fuse`` holds at most.
        protect: this many early layers take no part unless asked otherwise.
    """

    about: str
    choose: Callable[[Settings, Views], Iterator[Choice]]
    fuse: Fuse
    memory: Callable[[Outline, int], int]
    protect: int = 0

    @property
    def measured(self) -> bool:
        """It compares layers by ``--measure``, on a ``--schedule``."""
        return self.choose is choose.similar_pairs


METHODS = {
    "mka": Method("similar layers: their neurons compete", choose.similar_pairs, compete, competition_bytes, 4),
    "mka-paper": Method(
        "similar layers, averaged (arXiv 2406.16330)", choose.similar_pairs, fuse.average, fuse.layers_bytes, 4
    ),
    "tail": Method("the last layers, dropped", choose.tail, fuse.keep, fuse.layers_bytes),
    "shortgpt": Method(
        "layers of little influence, dropped (arXiv 2403.03853)", choose.least_influence, fuse.keep, fuse.layers_bytes
    ),
    "pruneme": Method(
        "the block that turns the stream least, dropped (arXiv 2403.17887)",
        choose.closest_block,
        fuse.keep,
        fuse.layers_bytes,
    ),
    "sleb": Method(
        "one after another what is missed least, dropped (arXiv 2402.09025)",
        choose.least_loss,
        fuse.keep,
        fuse.layers_bytes,
    ),
    "laco": Method("runs of layers, summed (arXiv 2402.11187)", choose.collapsible, fuse.collapse, fuse.layers_bytes),
    "replaceme": Method(
        "a block, replaced by a linear map (arXiv 2505.02819)", choose.alike_block, fuse.linear_map, fuse.map_bytes
    ),
}
