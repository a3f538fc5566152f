"""Where a model computes, and what to do when it does not fit there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mka_export.errors import MkaError, UsageError, out_of_memory


def pick_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a torch device.

    Raises:
        UsageError: it is not one of these, or not on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise UsageError(f"unknown --device {name!r}", "Use cpu, cuda, cuda:N or auto.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "--device cuda: torch sees no CUDA device", "Use --device cpu, or install a CUDA build of torch."
        )
    if number and int(number) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices")
    return torch.device(name)


def as_memory_allows(work: Callable[[Tensor], tuple[Tensor, ...]], states: Tensor) -> tuple[Tensor, ...]:
    """Return ``work(states)``, of halves of the batch where the whole does not fit in memory.

    Raises:
        MkaError: not even one window does.
    """
    try:
        return work(states)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        if len(states) == 1:
            raise MkaError(
                f"a layer pass over one window of {states.shape[1]} tokens does not fit in memory",
                "Close other programs, or use a machine with more memory.",
            ) from error
    if states.is_cuda:  # here the failed attempt has let go of its tensors
        torch.cuda.empty_cache()
    halves = [as_memory_allows(work, half) for half in states.tensor_split(2)]
    return tuple(torch.cat(parts) for parts in zip(*halves, strict=True))
