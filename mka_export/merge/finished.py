"""The merges done so far, kept on disk: a run that was killed goes on after the last of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mka_export.merge.fuse import Fused
from mka_export.merge.steps import Step, step_from
from mka_export.models.checkpoint_writer import save_tensors
from mka_export.publish import publish_file, seal, sealed


class Finished:
    """The weights of the layer that each merge made, sealed with all steps up to it.

    Args:
        folder: may hold those of earlier runs.
        windows: how many take part.

    Attributes:
        steps: in order.
        seconds: that choosing and fusing them took, in whichever run.
    """

    def __init__(self, folder: Path, windows: int) -> None:
        self.steps: list[Step] = []
        self.seconds = 0.0
        self._folder, self._windows, self._last = folder, windows, time.monotonic()

    @property
    def weights(self) -> Path:
        """The file of the last one."""
        return self._folder / f"pair-{len(self.steps)}.safetensors"

    def resume(self, remove: int) -> Iterator[Step]:
        """Take over what an earlier run finished, one step after another, at most so many."""
        while len(self.steps) < remove and (about := self._sealed()) is not None:
            try:
                step = step_from(about["from"]["steps"][-1])
            except (ValueError, LookupError, TypeError):
                return
            if not self._take(step, about):
                return
            yield self.steps[-1]

    def add(self, step: Step, fuse: Callable[[], tuple[Fused, dict[str, float]]]) -> Step:
        """Fuse layers, unless an earlier run did; returns the step with its figures."""
        about = self._sealed()
        if about is None or not self._take(step, about):
            weights, figures = fuse()
            file, now = self._folder / f"pair-{len(self.steps) + 1}.safetensors", time.monotonic()
            with publish_file(file) as writing:
                save_tensors(weights, writing)
            about = {"from": self._from(step), "figures": figures, "seconds": now - self._last}
            seal(file, about)
            self._take(step, about)
        return self.steps[-1]

    def _take(self, step: Step, about: Mapping[str, Any]) -> bool:
        if about.get("from") != self._from(step):
            return False
        self.steps.append(replace(step, figures=about["figures"]))
        self.seconds += about["seconds"]
        self._last = time.monotonic()
        return True

    def _sealed(self) -> dict[str, Any] | None:
        """Return what is known of the next one, where it is there and whole."""
        return sealed(self._folder / f"pair-{len(self.steps) + 1}.safetensors")

    def _from(self, step: Step) -> dict[str, Any]:
        return {
            "windows": self._windows,
            "steps": [asdict(each) | {"figures": {}} for each in (*self.steps, step)],
        }
