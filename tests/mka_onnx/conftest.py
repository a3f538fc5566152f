"""Make ONNX folders from pico models."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from mka_onnx import convert
from onnx_tools import target
from pico import make_pico
from workers import shared

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
    """``convert_to(folder, precision, **options)``: convert, or give what was made so before, by any worker."""

    def run(folder: Path, precision: str, **options: object) -> Artifact:
        name = "-".join(["onnx", *re.findall(r"\w+", f"{folder.name} {precision} {sorted(options.items())}")])
        with shared(tmp_path_factory, name) as out:
            made = out / "artifact.json"
            if not made.is_file():
                out.mkdir(exist_ok=True)
                artifact = convert(
                    Checkpoint.open(folder),
                    target(precision, **options),
                    out,
                    out,
                    activations=None,
                    calibration=CALIBRATION,
                    progress=Progress(quiet=True),
                )
                made.write_text(json.dumps({**asdict(artifact), "path": str(artifact.path)}))
        about = json.loads(made.read_text())
        return Artifact(Path(about["path"]), tuple(about["files"]), about["nbytes"], about["details"])

    return run
