"""The model under merge, as a choice of layers may look at it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from mka_export.merge.similarity import Similarities
from mka_export.merge.steps import Choice
from mka_export.merge.trajectory import Trajectory
from mka_export.models.runner import LayerRunner

TRIAL_WINDOWS = 16
ECHO = 64  # tokens that come twice
STATES = "states-"


def probe_windows(count: int) -> list[int]:
    """Return which of ``count`` calibration windows the probe has: one in eight, but from four to eight."""
    return _spread(range(count), max(4, min(8, count // 8)))


def _spread(windows: Sequence[int], count: int) -> list[int]:
    """Return ``count`` of them, evenly spread, or all if they are fewer."""
    count = min(count, len(windows))
    return [windows[i * len(windows) // count] for i in range(count)]


@dataclass(frozen=True)
class Views:
    """The model under merge.

    All windows take part in a fit, and run only to the layers that are fitted; a few of them are enough to choose layers
    by, and run to the top after every merge.

    Attributes:
        everything: the model on all calibration windows.
        probe: the same on some of them.
        similarities: of the layers, on the probe.
        notes: a file for what a choice measured, kept with the finished merges.
    """

    everything: Trajectory
    probe: Trajectory
    similarities: Similarities
    notes: Path

    @classmethod
    def of(cls, runner: LayerRunner, ids: Tensor, measure: str, states: Path, pieces: Path) -> Views:
        """Look at the original model.

        Args:
            ids: calibration windows (N, T).
            measure: of the similarity of layers: a name in ``MEASURES``.
            states: the states are kept here, and those of the original taken from here.
            pieces: where finished merges are kept.
        """
        folder = states / f"{STATES}{len(ids)}"  # fewer where windows were left out
        everything, few = Trajectory(runner, ids, folder / "all"), probe_windows(len(ids))
        probe = Trajectory(runner, ids, folder / "probe", few) if len(few) < len(ids) else everything
        return cls(everything, probe, Similarities(probe, measure), pieces / f"damages-{len(ids)}.json")

    @cached_property
    def trial(self) -> Trajectory:
        """The model on some windows that the probe has not, where there are any: what is fitted to them can be probed."""
        ids, probed = self.everything.ids, set(self.probe.windows)
        left = [window for window in self.everything.windows if window not in probed]
        if not left:
            return self.probe
        folder = self.everything.folder.with_name("trial")
        return Trajectory(self.everything.runner, ids, folder, _spread(left, TRIAL_WINDOWS))

    @cached_property
    def echo(self) -> Trajectory:
        """The model on what the probe's windows begin with, each twice in a row: (windows, 2 · ``ECHO``).

        The second time a model that copies from its context knows what comes. Text seldom repeats itself so soon, so that
        elsewhere it does not show whether a merge takes that away.
        """
        begun = self.probe.ids[:, :ECHO]
        folder = self.everything.folder.with_name("echo")
        return Trajectory(self.probe.runner, torch.cat([begun, begun], dim=1), folder)

    def replace(self, choice: Choice, file: Path) -> None:
        """Put one layer, with the float32 weights in ``file``, in the place of those that a merge takes."""
        self._replace({self.everything, self.probe}, choice, file)

    def replace_on_trial(self, choice: Choice, file: Path) -> None:
        """Do so on the windows that choices are made by only; ``reset`` ends it."""
        self._replace({self.probe, self.echo, self.trial}, choice, file)

    def reset(self) -> None:
        """Make the model under merge the original again."""
        for each in {self.everything, self.probe, self.echo, self.trial}:
            each.reset()
        self.similarities.forget(0)

    def _replace(self, where: Iterable[Trajectory], choice: Choice, file: Path) -> None:
        for each in where:
            each.replace(choice, file)
        self.similarities.forget(choice.position)
