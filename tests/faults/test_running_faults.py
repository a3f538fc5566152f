"""While running"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import type_in
from fault_tools import DONE, LOOSE, MERGE, SMALL, visible
from safetensors.torch import load_file, save_file

from mka_export.models.tokenizer import load_tokenizer
from mka_export.pipeline.forecast import Forecast
from mka_export.report import REPORT_FILES

COMMAND = [sys.executable, "-c", "from mka_export.cli import main; main()"]
RUN = [*MERGE, "--to", "gguf-q8", *SMALL, *LOOSE]


def start(*arguments: object, **options: object) -> subprocess.Popen[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload, no-any-return]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path, left: int) -> Path:
    """Write a file that leaves ``left`` bytes free."""
    filler = disk / "filler"
    with filler.open("wb") as f:
        f.write(bytes(max(0, shutil.disk_usage(disk).free - left)))
    return filler


@pytest.mark.parametrize(
    ("command", "left", "what"),
    [
        (RUN, 1_000_000, "of disk in"),
        (["compare", "--methods", "tail,mka", "--ratios", "0.2", *SMALL], 1_000_000, "comparing the methods needs"),
        (["similarity", *SMALL], 500_000, "looking at the layers needs"),
    ],
    ids=["run", "compare", "similarity"],
)
def test_refused_small_disk(command, left, what, small_disk, pico_llama):
    """the disk has too little room for the job: said before it starts"""
    fill(small_disk, left)
    words = [command[0], pico_llama, *command[1:]] if command is not RUN else [pico_llama, *command]
    result = type_in(*words, "--out", small_disk / "out", "--quiet")
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert what in line
    assert "are free. Free space there, or choose another --out." in line
    assert visible(small_disk / "out") <= {"manifest.json"}


@pytest.mark.parametrize(
    "left",
    [pytest.param(400, marks=pytest.mark.real), 900, pytest.param(1800, marks=pytest.mark.real)],
    ids="{} kB are left".format,
)
def test_survived_full_disk(left, small_disk, pico_llama, published, monkeypatch):
    """another program fills the disk in the middle of a stage: one line, and with more room the same command goes on"""
    out = small_disk / "out"

    def fill_after_the_check(self: Forecast) -> None:
        fill(small_disk, left * 1024)

    monkeypatch.setattr(Forecast, "require_disk", fill_after_the_check)
    result = type_in(pico_llama, *RUN, "--out", out, "--quiet")
    assert result.exit_code in (1, 3), result.output
    assert "Traceback" not in result.output
    told = result.stderr or result.stdout
    assert "No space left on device" in told or "cannot write" in told, told
    if result.exit_code == 1 and result.stderr:
        assert len(result.stderr.strip().splitlines()) == 1
    for stage in visible(out) - {"manifest.json", "parity", *REPORT_FILES}:
        record = json.loads((out / stage / "stage.json").read_text())
        assert all((out / stage / name).is_file() for name in record["files"])
    monkeypatch.undo()
    (small_disk / "filler").unlink()
    assert type_in(pico_llama, *RUN, "--out", out, "--quiet").exit_code in DONE
    artifact = next(published.rglob("*.gguf")).relative_to(published)
    for file in ("merged/model.safetensors", "merged/plan.json", artifact):
        assert (out / file).read_bytes() == (published / file).read_bytes()


@pytest.mark.parametrize("limit", [100_000, pytest.param(400_000, marks=pytest.mark.real)], ids="{} bytes".format)
def test_survived_file_limit(limit, model, tmp_path):
    """a file may not grow beyond a limit"""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    out = tmp_path / "out"
    process = start(model, *RUN, "--out", out, "--quiet", preexec_fn=limited)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "File too large" in errors
    assert len(errors.strip().splitlines()) == 1
    assert visible(out) <= {"manifest.json", "merged"}


def test_survived_two_at_once(model, tmp_path):
    """two processes on one output folder: the second is refused at once, the first is not disturbed"""
    out = tmp_path / "out"
    first = start(model, *RUN, "--out", out, "--quiet")
    while not (out / "manifest.json").exists() and first.poll() is None:
        time.sleep(0.05)
    second = type_in(model, *RUN, "--out", out, "--quiet")
    assert second.exit_code == 1
    assert "in use by another mka-export" in second.stderr
    _, errors = first.communicate(timeout=120)
    assert first.returncode in DONE, errors


def test_survived_interrupt(model, tmp_path):
    """Ctrl-C: no partial artifact, and the command that goes on is shown"""
    out = tmp_path / "out"
    process = start(model, *RUN, "--out", out)
    while not (out / ".merged.making").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    last = errors.strip().splitlines()[-1]
    assert "to go on: mka-export" in last
    assert str(out) in last
    assert "Traceback" not in errors
    assert visible(out) <= {"manifest.json", "merged"}


def test_survived_flipped_byte(model, published, tmp_path):
    """a byte of a finished stage has flipped: found by its hash, made again, and said"""
    out = Path(shutil.copytree(published, tmp_path / "out"))
    weights = out / "merged" / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    result = type_in("merge", model, *MERGE, "--out", out, *SMALL)
    assert result.exit_code == 0
    assert "made again, because model.safetensors is not as it was made" in result.stderr
    assert weights.read_bytes() == good


def test_survived_changed_settings(model, published, tmp_path):
    """the settings have changed since a stage was made: made again, and said"""
    out = Path(shutil.copytree(published, tmp_path / "out"))
    result = type_in("merge", model, "--ratio", "0.4", "--protect", "1", "--out", out, *SMALL)
    assert "made again, because these changed: merge" in result.stderr
    assert json.loads((out / "merged" / "config.json").read_text())["num_hidden_layers"] == 4


@pytest.mark.parametrize(
    ("package", "again"),
    [
        ("torch", {"merged", "gguf-q8", "parity/gguf-q8"}),
        ("gguf", {"gguf-q8"}),
        ("llama-cpp-python", {"gguf-q8", "parity/gguf-q8"}),
        ("onnxruntime-genai", set()),
    ],
    ids=["torch", "gguf", "llama.cpp", "onnxruntime-genai"],
)
def test_survived_another_version(package, again, pico_llama, published, tmp_path, update):
    """a package has been installed or updated since a stage was made: only what depends on it is made again"""
    out = Path(shutil.copytree(published, tmp_path / "out"))
    update(package)
    result = type_in(pico_llama, *RUN, "--out", out)
    assert result.exit_code in DONE, result.stderr
    said = [line.split(": made again, because these changed: versions") for line in result.stderr.splitlines()]
    assert {name for name, *rest in said if rest} == again


@pytest.mark.parametrize("what", ["output", "cache"])
def test_refused_where_nothing_can_be_written(what, model, tmp_path, monkeypatch, published):
    """the output, or the cache, cannot be written"""
    (tmp_path / "file").write_text("in the way")
    source, out = model, tmp_path / "out"
    if what == "output":
        out = tmp_path / "file" / "out"
    else:
        (source,) = (published / "gguf-q8").glob("*.gguf")
        monkeypatch.setenv("MKA_EXPORT_CACHE", str(tmp_path / "file" / "cache"))
    result = type_in(source, *RUN, "--out", out, "--quiet")
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1
    assert str(tmp_path / "file") in result.stderr
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A real file system that nothing can be written to."""
    disk = tmp_path / "read-only"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", disk], check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize("what", ["output", "cache"])
def test_refused_read_only(what, read_only, model, tmp_path, monkeypatch, published):
    """the output, or the cache, lies on a read-only file system"""
    source, out = model, read_only / "out"
    if what == "cache":
        (source,), out = (published / "gguf-q8").glob("*.gguf"), tmp_path / "out"
        monkeypatch.setenv("MKA_EXPORT_CACHE", str(read_only))
    result = type_in(source, *RUN, "--out", out, "--quiet")
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1
    assert str(read_only) in result.stderr
    assert "Read-only file system" in result.stderr
    assert visible(out) <= {"manifest.json"}


def test_refused_offline(tmp_path, monkeypatch):
    """the hub cannot be reached: what is missing, and how to get it"""
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    environment["MKA_EXPORT_CACHE"] = str(tmp_path / "cache")
    process = start("llama3.2-3b", *RUN, "--out", tmp_path / "out", "--quiet", env=environment)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert len(errors.strip().splitlines()) == 1
    assert "meta-llama/Llama-3.2-3B" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("fault", ["crashes", "hangs"])
def test_survived_runtime(fault, model, tmp_path, monkeypatch):
    """the runtime fails on one artifact: that target fails, the others go on"""
    from mka_export.pipeline import measuring

    really = measuring.open_runtime

    def fail_on_q8(name: str, path: Path, **options: object) -> object:
        if "Q8_0" not in path.name:
            return really(name, path, **options)
        if fault == "crashes":
            data, key = path.read_bytes(), b"llama.block_count" + struct.pack("<I", 4)
            at = data.index(key) + len(key)
            path = tmp_path / "crash.gguf"
            path.write_bytes(data[:at] + struct.pack("<I", 5000) + data[at + 4 :])
        runtime = really(name, path, **options)
        runtime._child.patience = 1.0
        os.kill(runtime._child._process.pid, signal.SIGSTOP)
        return runtime

    monkeypatch.setattr(measuring, "open_runtime", fail_on_q8)
    result = type_in(model, *RUN, "--to", "gguf-f16", "--out", tmp_path / "out", "--json", "--quiet")
    assert result.exit_code == 3
    q8, f16 = json.loads(result.stdout)["targets"]
    assert q8["verdict"] == "fail"
    assert ("crashed" if fault == "crashes" else "no sign of life") in q8["error"]
    assert f16["verdict"] in ("pass", "inconclusive")
    assert f16["comparisons"]["conversion"]["kl"]["mean"] < 0.001


@pytest.fixture
def allergic(model) -> Path:
    """A model in which one token, the letter Q, overflows in layer 1: a dimension that only it uses is multiplied."""
    weights = load_file(model / "model.safetensors")
    token = load_tokenizer(model).convert_tokens_to_ids("Q")
    weights["model.embed_tokens.weight"][:, -1] = 0.0
    weights["model.embed_tokens.weight"][token, -1] = 1.0
    for name, tensor in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor[-1] = 0.0
    weights["model.layers.1.post_attention_layernorm.weight"][-1] = 1e18
    for row in ("gate_proj", "up_proj"):
        weights[f"model.layers.1.mlp.{row}.weight"][0, -1] = 10.0
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return model


def q_in(windows: int, path: Path) -> Path:
    """Write a text of which about 16 windows of 512 tokens can be cut, with a Q in some."""
    words = "the quick brown fox jumps over the lazy dog and then sleeps under a tree. " * 10
    path.write_text("".join(words + "Q" * (i < windows) for i in range(32)), encoding="utf-8")
    return path


@pytest.mark.parametrize("command", ["merge", "convert"])
def test_survived_nan_activations(command, allergic, tmp_path):
    """a few windows of the calibration text turn NaN in the model: left out, and said"""
    run = [command, allergic, "--out", tmp_path / "out", "--calibration", q_in(1, tmp_path / "text"), *SMALL]
    run[run.index("512")] = "8192"
    run += MERGE if command == "merge" else ["--to", "gguf-q4", *LOOSE]
    result = type_in(*run)
    assert "windows of the calibration text make NaN or infinity, in layer 1: left out" in result.stderr
    if command == "merge":
        assert result.exit_code == 0
        plan = json.loads((tmp_path / "out" / "merged" / "plan.json").read_text())
        assert plan["calibration"]["left_out"] == 1
        assert plan["calibration"]["tokens"] % 512 == 0
        weights = load_file(tmp_path / "out" / "merged" / "model.safetensors")
        assert all(t.isfinite().all() for t in weights.values())
    else:
        assert next((tmp_path / "out").rglob("*.gguf")).stat().st_size > 0


def test_refused_nan_activations(allergic, tmp_path, refused):
    """more than a tenth of the calibration text turns NaN in the model"""
    text = q_in(20, tmp_path / "text")
    words = ("windows of the calibration text make NaN or infinity", "layer 1", "give another")
    refused([allergic, *RUN, "--out", "{out}", "--calibration", text, "--calibration-tokens", "8192"], *words)
