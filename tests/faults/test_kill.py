"""Killed"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType, SimpleNamespace

import psutil
import pytest
from command import type_in
from fault_tools import DONE, LOOSE, MERGE, SMALL, contents
from mka_gguf import conversion
from mka_onnx import conversion as onnx_conversion
from pico import make_pico
from safetensors.torch import load_file, save_file

from mka_export.cli import main
from mka_export.hashes import file_sha256
from mka_export.merge.methods import METHODS
from mka_export.pipeline import depth, measuring

PAIRS = 2
REST = ["--protect", "1", "--to", "gguf-q8", *SMALL, *LOOSE, "--quiet"]
RUN = ["--ratio", "0.4", *REST]
FORK = multiprocessing.get_context("fork")
# Audit events of the file system. Between two of them nothing changes in a folder but the length of an open file.
EVENTS = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "shutil.rmtree")

Arm = Callable[[Path], None]  # called in a process that is to run a job in that folder: has it die at some instant


def watch(out: Path, event: str, pattern: str, then: Callable[[], object]) -> None:
    """Call ``then`` before each such event of this process on a path in ``out`` that fits the pattern."""

    def hook(name: str, arguments: tuple[object, ...]) -> None:
        if name in EVENTS and fnmatch(name, event) and isinstance(arguments[0], str | os.PathLike):
            path = Path(arguments[0])
            if path.is_relative_to(out) and fnmatch(path.relative_to(out).as_posix(), pattern):
                then()

    sys.addaudithook(hook)


def before(event: str, pattern: str, n: int = 1) -> Arm:
    """Die just before the n-th such event."""

    def arm(out: Path) -> None:
        earlier = iter(range(1, n))
        watch(out, event, pattern, lambda: next(earlier, None) or die())

    return arm


def inside(module: ModuleType, function: str) -> Arm:
    """Die where the job calls a function for the first time."""
    return lambda out: setattr(module, function, die)


def while_quantizing(out: Path) -> None:
    """Die when the quantizer, a process of its own, has done its first tensor."""
    quantize = conversion.quantize
    conversion.quantize = lambda *arguments: quantize(*arguments[:-1], SimpleNamespace(advance=die))


def while_building(out: Path) -> None:
    """Die when onnxruntime-genai's builder, a process of its own, has read its first layer."""
    build = onnx_conversion.build
    onnx_conversion.build = lambda *arguments: build(*arguments[:-1], SimpleNamespace(advance=die))


def die(*_: object, **__: object) -> None:
    children = [str(child.pid) for child in multiprocessing.active_children()]
    (Path(tempfile.gettempdir()) / "children").write_text("\n".join(children))
    os.kill(os.getpid(), signal.SIGKILL)


STAGES: dict[str, Arm] = {  # in the order of the job, so that one job can be killed at each in turn
    "the output folder has just been made": before("open", ".lock"),
    "the states of the layers are being computed": before("open", ".merged.pieces/states-*/all/original-4.f32"),
    "the first pair is written but not sealed": before("open", ".merged.pieces/.pair-1.safetensors.seal.writing"),
    "the second pair is being written": before("os.rename", ".merged.pieces/.pair-2.safetensors.writing"),
    "the merged checkpoint is whole but not published": before("os.rename", ".merged.making"),
    "the unquantized file is written but not sealed": before("open", ".gguf-q8.pieces/.unquantized.gguf.seal.writing"),
    "llama.cpp's quantizer is at work": while_quantizing,
    "the artifact is whole but not published": before("os.rename", ".gguf-q8.making"),
    "the artifact is being measured": inside(measuring, "score"),
    "the measurement is whole but not published": before("os.rename", "parity/.gguf-q8.making"),
    "the report is being written": before("os.rename", ".report.json.writing"),
    "the report's page is being written": before("os.rename", ".report.html.writing"),
    "the model card is whole but not published": before("os.rename", "card/.gguf-q8.making"),
}
BETWEEN: dict[str, Arm] = {
    "the first manifest is being written": before("os.rename", ".manifest.json.writing"),
    "the equations of the first pair are being written": before("open", ".merged.pieces/states-*/all/fit-weights.f32"),
    "the first pair is being written": before("os.rename", ".merged.pieces/.pair-1.safetensors.writing"),
    "the first pair is sealed": before("os.remove", ".merged.pieces/.pair-1.safetensors.seal.writing"),
    "the second pair is written but not sealed": before("open", ".merged.pieces/.pair-2.safetensors.seal.writing"),
    "the merged checkpoint is being written": before("open", ".merged.making/config.json"),
    "the merged checkpoint lacks its plan": before("open", ".merged.making/plan.json"),
    "the merged checkpoint is published, its pieces are still there": before("shutil.rmtree", ".merged.pieces", 2),
    "the unquantized file is being written": before("os.rename", ".gguf-q8.pieces/.unquantized.gguf.writing"),
    "the unquantized file is sealed": before("os.remove", ".gguf-q8.pieces/.unquantized.gguf.seal.writing"),
    "the artifact is published, its pieces are still there": before("shutil.rmtree", ".gguf-q8.pieces", 2),
    "the measurement is published, its pieces are still there": before("shutil.rmtree", "parity/.gguf-q8.pieces", 2),
    "the last manifest is being written": before("os.rename", ".manifest.json.writing", 2),
}
ONNX: dict[str, Arm] = {
    "the graph is being built": while_building,
    "the weights are being fitted": inside(onnx_conversion, "fit_weights"),
    "the folder is whole but not published": before("os.rename", ".onnx-int4.making"),
}
REPLACING: dict[str, Arm] = {
    "the older checkpoint is put aside, the new one not yet in its place": before("os.rename", ".merged.making"),
    "the older checkpoint is replaced but not yet removed": before("shutil.rmtree", ".merged.old.making", 2),
    "the older measurement is put aside, the new one not yet in its place": before(
        "os.rename", "parity/.gguf-q8.making"
    ),
    "the older measurement is replaced but not yet removed": before("shutil.rmtree", "parity/.gguf-q8.old.making", 2),
}


def run_in_fork(model: Path, out: Path, arm: Arm, job: Sequence[str] = RUN) -> int | None:
    """Run a main job in a process of its own, and check what it leaves; returns its exit code.

    It is forked, so that it need not import everything again.
    """
    scratch = out.with_name("tmp")
    scratch.mkdir(parents=True, exist_ok=True)

    def run() -> None:
        tempfile.tempdir = str(scratch)
        arm(out)
        main([str(model), *job, "--out", str(out)])

    process = FORK.Process(target=run)
    process.start()
    process.join()
    if (children := scratch / "children").exists():
        for child in children.read_text().split():
            wait_for_end(int(child))
        children.unlink()
    assert not list(scratch.iterdir())
    whole(out)
    return process.exitcode


def wait_for_end(process: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        end = time.monotonic() + 10
        while psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < end, "it outlives the job"
            time.sleep(0.01)


def whole(out: Path) -> None:
    """Check that what stands under a final name is whole."""
    for path in out.glob("[!.]*.json"):
        json.loads(path.read_text())
    for folder in [*out.glob("[!.]*/"), *out.glob("parity/[!.]*/"), *out.glob("depth/[!.]*/")]:
        if folder.is_dir() and folder.name not in ("parity", "depth", "card"):
            files = json.loads((folder / "stage.json").read_text())["files"]
            assert {name: file_sha256(folder / name) for name in files} == files
    assert all("\n## Licence\n" in path.read_text() for path in out.glob("card/[!.]*/README.md"))


def lasting(out: Path) -> dict[str, bytes]:
    """Return what must be the same: all of checkpoint, plan and artifact, but not how long they took."""
    found = contents(out)
    made = ("merged/", "gguf-q8/", "onnx-int4/")
    return {n: data for n, data in found.items() if n.startswith(made) and "stage.json" not in n}


def finished(out: Path) -> dict[str, tuple[int, int]]:
    """Return the identity of every file that is published, or sealed as a piece."""
    files = [file for record in out.rglob("stage.json") for file in record.parent.iterdir()]
    files += [seal.with_suffix("") for seal in out.glob(".*.pieces/*.seal")]
    told = {file.relative_to(out).as_posix(): file.stat() for file in files}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in told.items() if ".making/" not in name}


def left_alone(model: Path, out: Path, job: Sequence[str] = RUN) -> tuple[dict[str, bytes], int]:
    """Return what a job that is left alone makes, and how many events it takes."""
    events = FORK.Value("i")

    def count() -> None:
        events.value += 1

    assert run_in_fork(model, out, lambda out: watch(out, "*", "*", count), job) in DONE
    return lasting(out), events.value


@pytest.fixture(scope="session")
def parted(tmp_path_factory) -> Path:
    """A pico model whose layer 3 writes massive activations: layers 1 and 2, 4 and 5 are all that can be merged."""
    folder = make_pico(tmp_path_factory.mktemp("parted") / "pico", "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.3.mlp.down_proj.weight"] *= 1000
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def undisturbed(parted, tmp_path_factory) -> tuple[dict[str, bytes], int]:
    return left_alone(parted, tmp_path_factory.mktemp("undisturbed") / "out")


@pytest.fixture(scope="session")
def older(parted, tmp_path_factory) -> Path:
    """The folder of a finished job with another ratio."""
    out = tmp_path_factory.mktemp("older") / "out"
    left_alone(parted, out, ["--ratio", "0.2", *REST])
    return out


@pytest.fixture
def goes_on(parted, undisturbed, monkeypatch):
    """``goes_on(out)``: run again, and check that nothing finished is made twice and every byte is the same."""
    made: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **options: object) -> object:
            made[name] += 1
            return function(*args, **options)

        return call

    def run(out: Path, *, count: bool = True) -> None:
        def missing(name: str) -> int:
            return 0 if (out / name).is_dir() else 1

        def sealed(pattern: str) -> int:
            return len(list(out.glob(f"{pattern}.seal")))

        unmade = Counter(
            fit=missing("merged") * (PAIRS - sealed(".merged.pieces/pair-*")),
            write=missing("gguf-q8") * (1 - sealed(".gguf-q8.pieces/unquantized.gguf")),
            quantize=missing("gguf-q8"),
            measure=missing("parity/gguf-q8"),
        )
        method = METHODS["mka"]
        monkeypatch.setitem(METHODS, "mka", dataclasses.replace(method, fuse=counted("fit", method.fuse)))
        monkeypatch.setattr(conversion, "write", counted("write", conversion.write))
        monkeypatch.setattr(conversion, "quantize", counted("quantize", conversion.quantize))
        monkeypatch.setattr(measuring, "score", counted("measure", measuring.score))
        assert type_in(parted, *RUN, "--out", out).exit_code in DONE
        assert made == unmade or not count
        assert lasting(out) == undisturbed[0]
        assert not [p.name for p in out.rglob(".*") if p.name != ".lock"]
        assert type_in("verify", out, "--quiet").exit_code == 0

    return run


def real(values: Iterable[object]) -> list[object]:
    return [pytest.param(value, marks=pytest.mark.real) for value in values]


@pytest.mark.real
def test_survived_kill_in_every_stage(parted, goes_on, tmp_path):
    """kill -9 in every stage of one job, one after the other: what is finished is not touched again"""
    out, earlier = tmp_path / "out", {}
    for instant, arm in STAGES.items():
        assert run_in_fork(parted, out, arm) == -signal.SIGKILL, instant
        now = finished(out)
        assert {name: now.get(name, was) for name, was in earlier.items()} == earlier, instant
        earlier = now
    goes_on(out)


@pytest.mark.parametrize("instant", real([*STAGES, *BETWEEN]))
def test_survived_kill(instant, parted, goes_on, tmp_path):
    """kill -9"""
    out = tmp_path / "out"
    assert run_in_fork(parted, out, (STAGES | BETWEEN)[instant]) == -signal.SIGKILL
    goes_on(out)


@pytest.mark.real
def test_survived_kills_while_making_onnx(tmp_path):
    """kill -9 in every part of a conversion to ONNX, one after the other"""
    model, out = make_pico(tmp_path / "pico", "llama", intermediate_size=192), tmp_path / "killed" / "out"
    job = [*MERGE, "--to", "onnx-int4", *SMALL, *LOOSE, "--quiet"]
    made, _ = left_alone(model, tmp_path / "undisturbed" / "out", job)
    assert any(name.endswith("model_q4.onnx_data") for name in made)
    for instant, arm in ONNX.items():
        assert run_in_fork(model, out, arm, job) == -signal.SIGKILL, instant
        assert not (out / "onnx-int4").exists()
    assert run_in_fork(model, out, lambda out: None, job) in DONE
    assert lasting(out) == made


@pytest.mark.parametrize("instant", real(REPLACING))
def test_survived_kill_while_replacing(instant, parted, older, goes_on, tmp_path):
    """kill -9 in a job with other settings than the finished one in the same folder"""
    out = Path(shutil.copytree(older, tmp_path / "out"))
    assert run_in_fork(parted, out, REPLACING[instant]) == -signal.SIGKILL
    goes_on(out, count=False)


@pytest.mark.parametrize("seed", [0, *real(range(1, 6))], ids="seed {}".format)
def test_survived_kills(seed, parted, undisturbed, goes_on, tmp_path):
    """kill -9 three times in one job, at random instants"""
    draw, out = random.Random(seed), tmp_path / "out"
    for kill in range(3):
        code = run_in_fork(parted, out, before("*", "*", draw.randint(1, undisturbed[1])))
        assert code == -signal.SIGKILL or (kill and code in DONE)  # it may end before a late instant
    goes_on(out)


@pytest.mark.real
def test_survived_kills_while_searching(parted, tmp_path, monkeypatch):
    """kill -9 five times in one job with --ratio auto, at random instants"""
    monkeypatch.setattr(depth, "chance", lambda vocabulary: math.inf)  # a pico model is no better than it
    search, draw = ["--ratio", "auto", *REST, "--windows", "6"], random.Random(0)
    made, events = left_alone(parted, tmp_path / "undisturbed", search)
    for _ in range(5):
        arm = before("*", "*", draw.randint(1, events))
        assert run_in_fork(parted, tmp_path / "out", arm, search) in (-signal.SIGKILL, *DONE)
    assert run_in_fork(parted, tmp_path / "out", lambda out: None, search) in DONE
    assert lasting(tmp_path / "out") == made
    assert not [p.name for p in (tmp_path / "out").rglob(".*") if p.name != ".lock"]
