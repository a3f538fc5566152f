"""States of all calibration tokens at one place in a model, in a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class StatesFile:
    """A float32 array (tokens, features) on disk, read and written a few rows at a time.

    Args:
        path: the file; made by the first ``write``.
        features: its columns.
    """

    def __init__(self, path: Path, features: int) -> None:
        self.path, self.features = path, features

    def read(self, rows: slice) -> Tensor:
        """Return some rows: (rows, features), on the CPU."""
        # Plain reads and not a memory map: pages of a map count as the process's memory.
        count, offset = (rows.stop - rows.start) * self.features, rows.start * self.features * 4
        return torch.from_numpy(np.fromfile(self.path, dtype=np.float32, count=count, offset=offset)).view(
            -1, self.features
        )

    def write(self, first: int, states: Tensor) -> None:
        """Write ``states`` (n, features) from row ``first`` on."""
        with self.path.open("r+b" if self.path.exists() else "wb") as f:
            f.seek(first * self.features * 4)
            f.write(states.cpu().contiguous().numpy().data)  # numpy's tofile does not say that the disk is full
