"""Make ONNX folders from pico models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mka_onnx import convert
from onnx_tools import target
from pico import make_pico

from mka_export.models.checkpoint import Checkpoint
from mka_export.progress import Progress
from mka_export.target import Artifact

Convert = Callable[..., Artifact]
CALIBRATION = torch.from_numpy(np.random.default_rng(5).integers(3, 640, (8, 128)))


def with_even_blocks(folder: Path, family: str) -> Path:
    return make_pico(folder, family, intermediate_size=192)


@pytest.fixture(scope="session")
def pico_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_even_blocks(tmp_path_factory.mktemp("even") / "pico-llama", "llama")


@pytest.fixture(scope="session")
def pico_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_even_blocks(tmp_path_factory.mktemp("even") / "pico-qwen2", "qwen2")


@pytest.fixture(scope="session")
def convert_to(tmp_path_factory: pytest.TempPathFactory) -> Convert:
    """``convert_to(folder, precision, **options)``: convert into a new folder, or give what was made so before."""
    made: dict[object, Artifact] = {}

    def run(folder: Path, precision: str, **options: object) -> Artifact:
        key = folder, precision, *sorted(options.items())
        if key not in made:
            out = tmp_path_factory.mktemp("onnx")
            quiet = Progress(quiet=True)
            made[key] = convert(
                Checkpoint.open(folder),
                target(precision, **options),
                out,
                out,
                activations=None,
                calibration=CALIBRATION,
                progress=quiet,
            )
        return made[key]

    return run
