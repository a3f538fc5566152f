"""No NaN and no infinity: in weights they are refused, and of calibration text what makes them is left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from mka_export.errors import CheckpointError, MkaError
from mka_export.progress import Progress

Result = TypeVar("Result")

MAX_LEFT_OUT = 0.1  # of the calibration windows, where a layer makes NaN of them


def require_finite(name: str, tensor: Tensor) -> None:
    """Check the numbers of the tensor called ``name``.

    Raises:
        CheckpointError: it holds NaN or infinity.
    """
    if not bool(torch.stack(tensor.aminmax()).isfinite().all()):  # NaN comes through; far faster than isfinite
        raise CheckpointError(f"tensor {name} holds NaN or infinity", "The model is damaged: fetch it again.")


class MakesNaN(MkaError):
    """A model, or what was made of it, computes NaN or infinity."""


class NotFinite(MakesNaN):
    """States of some windows that hold NaN or infinity.

    Attributes:
        windows: the windows in which it does.
    """

    def __init__(self, where: str, windows: list[int]) -> None:
        super().__init__(f"{where} makes NaN or infinity", "The model is damaged or needs another precision.")
        self.where, self.windows = where, windows


def check_finite(states: Tensor, where: str, windows: Sequence[int]) -> None:
    """Check the states (batch, T, hidden) of the windows with these numbers.

    Raises:
        NotFinite: some hold NaN or infinity; the message names ``where``.
    """
    finite = states.isfinite().all(dim=-1).all(dim=-1)
    if not bool(finite.all()):
        raise NotFinite(where, [windows[i] for i in (~finite).nonzero().flatten().tolist()])


def on_finite_windows(ids: Tensor, work: Callable[[Tensor], Result], progress: Progress) -> Result:
    """Return ``work(ids)``; windows in which some layer makes NaN or infinity are left out, and that is said.

    Raises:
        MakesNaN: these are more than ``MAX_LEFT_OUT`` of the windows (N, T).
    """
    kept = torch.arange(len(ids))
    while True:
        try:
            return work(ids[kept])
        except NotFinite as error:
            kept = kept[~torch.isin(torch.arange(len(kept)), torch.tensor(error.windows))]
            lost = len(ids) - len(kept)
            told = f"{lost} of {len(ids)} windows of the calibration text make NaN or infinity, in {error.where}"
            if lost > MAX_LEFT_OUT * len(ids):
                raise MakesNaN(told, "The model is damaged, or the text is not for it: give another.") from None
            progress.say(f"{told}: left out")
