"""Fixtures for all tests: pico models that are built in a second, and the real ones where they are."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import Result
from command import type_in
from workers import shared

# Pico models are far too small to gain from threads, which then only wait for each other: llama.cpp's spin at every
# barrier, and where the cores are busy a token takes a hundred times as long. It asks for as many as there are cores,
# whatever OMP_NUM_THREADS says, but gets no more than the limit.
for name in ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

from pico import REPOSITORY, make_pico  # noqa: E402  (it loads torch, for which the threads must be set)

LONG = ("test_mmlu_real.py", "test_real.py", "test_browser_real.py", "test_onnx_real.py")


@pytest.hookimpl(trylast=True)  # of those that are left by -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take minutes: a file stays on one worker, and the last must not keep the other waiting."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def pico_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pico(tmp_path_factory.mktemp("pico") / "pico-llama", "llama")


@pytest.fixture(scope="session")
def pico_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pico(tmp_path_factory.mktemp("pico") / "pico-qwen2", "qwen2")


@pytest.fixture
def update(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``update(package)``: have another version of it installed."""

    def run(package: str) -> None:
        monkeypatch.setattr(
            "mka_export.pipeline.job.version", lambda name: "99.9" if name == package else version(name)
        )

    return run


def _real(name: str) -> Path:
    folder = os.environ.get("MKA_TEST_MODELS")
    if not folder:
        pytest.skip("MKA_TEST_MODELS names no folder with the real models")
    path = Path(folder) / name
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return path


@pytest.fixture(scope="session")
def real_smollm2() -> Path:
    return _real("smollm2-135m-instruct-q4_1.gguf")


@pytest.fixture(scope="session")
def real_qwen() -> Path:
    return _real("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    path = REPOSITORY.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"{path} is not there")
    return path


@pytest.fixture(scope="session")
def four_bits(real_smollm2: Path, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """SmolLM2 in int4 ONNX, in a folder of this worker's: its folder, and what the command said."""
    text = ["--text", shared_data / "wikitext2" / "wiki.test.raw", "--windows", "8", "--window-tokens", "256"]
    command = ["convert", real_smollm2, "--to", "onnx-int4", *text, "--json", "--quiet", "--out"]
    out = tmp_path_factory.mktemp("int4") / "out"
    with shared(tmp_path_factory, "int4") as made:
        type_in(*command, made)  # in the second worker all is there
        shutil.copytree(made, out)
    result = type_in(*command, out)
    (folder,) = (path for path in (out / "onnx-int4").iterdir() if path.is_dir())
    return folder, result
