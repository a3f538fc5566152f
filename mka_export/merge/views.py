"""The model under merge, as a choice of layers may look at it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mka_export.merge.similarity import Similarities
from mka_export.merge.trajectory import Trajectory
from mka_export.models.runner import LayerRunner

PROBE_WINDOWS = 4
STATES = "states-"


@dataclass(frozen=True)
class Views:
    """The model under merge.

    All windows take part in a fit, and run only to the layers that are fitted; a few of them are enough for the graph of
    the similarity, and run to the top after every merge.

    Attributes:
        everything: the model on all calibration windows.
        probe: the same on some of them.
        similarities: of the layers, on the probe.
    """

    everything: Trajectory
    probe: Trajectory
    similarities: Similarities

    @classmethod
    def of(cls, runner: LayerRunner, ids: Tensor, measure: str, states: Path) -> Views:
        """Look at the original model.

        Args:
            ids: calibration windows (N, T).
            measure: of the similarity of layers: a name in ``MEASURES``.
            states: the states are kept here, and those of the original taken from here.
        """
        folder = states / f"{STATES}{len(ids)}"  # fewer where windows were left out
        everything = Trajectory(runner, ids, folder / "all")
        few = len(ids) <= PROBE_WINDOWS
        probe = everything if few else Trajectory(runner, ids, folder / "probe", every=len(ids) // PROBE_WINDOWS)
        return cls(everything, probe, Similarities(probe, measure))

    def replace(self, position: int, last: int, file: Path) -> None:
        """Put one layer, with the float32 weights in ``file``, in the place of those from ``position`` to ``last``."""
        for each in {self.everything, self.probe}:
            each.replace(position, last, file)
        self.similarities.forget(position)
