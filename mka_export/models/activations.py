"""What a pass over the calibration text leaves behind for later stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Activations:
    """Column statistics of every linear layer's input, known to llama.cpp as the importance matrix.

    Attributes:
        mean_square: weight name (``model.layers.3.mlp.down_proj.weight``) -> mean of the squared input,
            one value an input column: (in_features,), float32.
        tokens: how many token positions the means are over.
        calibration: sha256 of the calibration tokens.
    """

    mean_square: Mapping[str, Tensor]
    tokens: int
    calibration: str

    def save(self, path: Path) -> None:
        """Write to a safetensors file."""
        metadata = {"tokens": str(self.tokens), "calibration": self.calibration}
        save_file({k: v.to(torch.float32).contiguous() for k, v in self.mean_square.items()}, path, metadata=metadata)

    @classmethod
    def load(cls, path: Path) -> Activations:
        """Read what ``save`` wrote."""
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata()
            return cls({k: f.get_tensor(k) for k in f.keys()}, int(metadata["tokens"]), metadata["calibration"])
