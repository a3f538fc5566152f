"""What the original says of the training text, computed once, layer by layer, and kept on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mka_export.models.finite import check_finite
from mka_export.models.outline import Outline
from mka_export.models.runner import LayerRunner
from mka_export.needs import Need
from mka_export.progress import Progress
from mka_export.publish import seal, sealed

TOP = 128  # most likely next tokens kept at each position; what is left of the probability counts as one more
CHUNK_TOKENS = 16384  # whose states are in memory together

KINDS = {"tokens": np.int32, "log_probs": np.float16, "states": np.float16}


@dataclass(frozen=True)
class Teacher:
    """The original's answers for some windows, as maps of files.

    Attributes:
        tokens: ids of the most likely next tokens: (N, T, TOP).
        log_probs: theirs.
        states: the stream after the last layer, before the final norm: (N, T, hidden).
    """

    tokens: NDArray[np.int32]
    log_probs: NDArray[np.float16]
    states: NDArray[np.float16]


def teacher_need(model: Outline, tokens: int) -> Need:
    """Return what ``ask_teacher`` takes over so many tokens."""
    kept = tokens * (TOP * (4 + 2) + 2 * model.hidden_size)
    return Need(kept=kept, memory=4 * CHUNK_TOKENS * model.hidden_size + 8 * 512 * model.vocab_size)


def ask_teacher(runner: LayerRunner, ids: Tensor, folder: Path, progress: Progress) -> Teacher:
    """Run the original over windows (N, T); what an earlier run kept in ``folder`` is taken from there.

    The states are scaled to a mean square of 1 at each position, as the final norm sees them.

    Raises:
        NotFinite: it makes NaN or infinity somewhere.
    """
    windows, length = ids.shape
    top = min(TOP, runner.checkpoint.vocab_size)
    columns = {"tokens": top, "log_probs": top, "states": runner.checkpoint.hidden_size}
    shapes = {name: (windows, length, width) for name, width in columns.items()}
    files = {name: folder / f"teacher-{name}.bin" for name in KINDS}
    about = {"windows": [windows, length, int(ids.sum())]}
    if any(sealed(file) != about for file in files.values()):
        _write(runner, ids, files, shapes, progress)
        for file in files.values():
            seal(file, about)
    maps = {name: np.memmap(file, KINDS[name], "r", shape=shapes[name]) for name, file in files.items()}
    return Teacher(**maps)


def _write(
    runner: LayerRunner,
    ids: Tensor,
    files: dict[str, Path],
    shapes: dict[str, tuple[int, int, int]],
    progress: Progress,
) -> None:
    step = max(1, CHUNK_TOKENS // ids.shape[1])
    maps = {name: np.memmap(file, KINDS[name], "w+", shape=shapes[name]) for name, file in files.items()}
    for start in range(0, len(ids), step):
        states = runner.hidden_states(ids[start : start + step], progress)
        check_finite(states, "the original", range(start, start + len(states)))
        for window, stream in enumerate(states, start):
            found = runner.logits(stream).log_softmax(dim=-1).topk(shapes["tokens"][2])
            maps["tokens"][window] = found.indices.cpu().numpy()
            maps["log_probs"][window] = found.values.cpu().numpy()
            maps["states"][window] = unit(stream).cpu().numpy()
    for written in maps.values():
        written.flush()


def unit(states: Tensor) -> Tensor:
    """Scale states to a mean square of 1."""
    return states * states.square().mean(dim=-1, keepdim=True).clamp_min(1e-12).rsqrt()
