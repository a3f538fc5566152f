"""What a pass over the calibration text leaves behind for later stages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from mka_export.models.checkpoint import Checkpoint
from mka_export.models.checkpoint_writer import save_tensors
from mka_export.models.finite import check_finite, on_finite_windows
from mka_export.models.outline import Outline
from mka_export.models.runner import LayerRunner, layer_pass_bytes
from mka_export.models.statistics import ColumnStatistics
from mka_export.needs import Need
from mka_export.progress import Progress


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
        # One key: safetensors writes several in an order that changes from run to run.
        metadata = {"calibration": json.dumps({"tokens": self.tokens, "sha256": self.calibration})}
        save_tensors(self.mean_square, path, metadata)

    @classmethod
    def load(cls, path: Path) -> Activations:
        """Read what ``save`` wrote."""
        with safe_open(path, framework="pt") as f:
            about = json.loads(f.metadata()["calibration"])
            names = f.keys()  # a file, no mapping: it does not iterate
            return cls({name: f.get_tensor(name) for name in names}, about["tokens"], about["sha256"])


def calibration_need(model: Outline, tokens: int) -> Need:
    """Return what ``calibrate`` takes over ``tokens`` tokens: a layer, and the states of all of them."""
    columns = sum(shape[-1] for shape in model.shapes.values())
    return Need(kept=4 * columns, memory=layer_pass_bytes(model) + 4 * tokens * model.hidden_size)


def calibrate(runner: LayerRunner, ids: Tensor, calibration: str, progress: Progress) -> Activations:
    """Run a model over calibration windows (N, T) and keep only the statistics.

    Args:
        calibration: sha256 of ``ids``.

    Raises:
        MkaError: more windows turn NaN or infinite than may be left out.
    """
    checkpoint: Checkpoint = runner.checkpoint

    def work(ids: Tensor) -> Activations:
        states, found = runner.embed(ids), {}
        with progress.task("calibration", checkpoint.num_layers) as task:
            for index in range(checkpoint.num_layers):
                weights, statistics = runner.weights(index), ColumnStatistics()
                for batch in runner.batches(*ids.shape):
                    states[batch] = runner.run_layer(index, weights, states[batch], statistics)
                check_finite(states, f"layer {index}", range(len(ids)))
                for name, mean_square in statistics.mean_square.items():
                    found[checkpoint.architecture.layer_name(index, name)] = mean_square
                task.advance()
        return Activations(found, ids.numel(), calibration)

    return on_finite_windows(ids, work, progress)
