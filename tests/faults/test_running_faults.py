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
from fault_tools import DONE, LOOSE, MERGE, SMALL, type_in

COMMAND = [sys.executable, "-c", "from mka_export.cli import main; main()"]
RUN = [*MERGE, "--to", "gguf-q8", *SMALL, *LOOSE]


def visible(out: Path) -> set[str]:
    return {p.name for p in out.iterdir() if not p.name.startswith(".")} if out.is_dir() else set()


def start(*arguments: object, **options: object) -> subprocess.Popen[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload, no-any-return]


@pytest.fixture(params=[400, 900, 1800], ids="{} kB".format)
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A real file system that fills up, each size in another stage."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={request.param}k", "tmpfs", str(disk)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_survived_full_disk(small_disk, pico_llama, published):
    """the disk fills up in the middle of a stage: one line, and with more room the same command goes on"""
    out = small_disk / "out"
    result = type_in(pico_llama, *RUN, "--out", out, "--quiet")
    assert result.exit_code in (1, 3), result.output
    assert "Traceback" not in result.output
    told = result.stderr or result.stdout
    assert "No space left on device" in told or "cannot write" in told, told
    if result.exit_code == 1 and result.stderr:
        assert len(result.stderr.strip().splitlines()) == 1
    for stage in visible(out) - {"manifest.json", "report.json", "parity"}:
        record = json.loads((out / stage / "stage.json").read_text())
        assert all((out / stage / name).is_file() for name in record["files"])
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert type_in(pico_llama, *RUN, "--out", out, "--quiet").exit_code in DONE
    artifact = next(published.rglob("*.gguf")).relative_to(published)
    for file in ("merged/model.safetensors", "merged/plan.json", artifact):
        assert (out / file).read_bytes() == (published / file).read_bytes()


@pytest.mark.parametrize("limit", [100_000, 400_000], ids="{} bytes".format)
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
    assert process.returncode == 130
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


def test_survived_edited_artifact(published, tmp_path):
    """an artifact was edited after it was checked: verify finds it"""
    out = Path(shutil.copytree(published, tmp_path / "out"))
    (gguf,) = (out / "gguf-q8").glob("*.gguf")
    gguf.write_bytes(gguf.read_bytes()[:-1] + b"!")
    result = type_in("verify", out, "--quiet")
    assert result.exit_code == 1
    assert f"changed  gguf-q8/{gguf.name}" in result.stdout


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


def test_survived_crashing_runtime(model, tmp_path, monkeypatch):
    """the runtime crashes on one artifact: that target fails, the others go on"""
    from mka_export.pipeline import job

    really = job.open_runtime

    def crash_on_q8(name: str, path: Path, **options: object) -> object:
        if "Q8_0" in path.name:
            data, key = path.read_bytes(), b"llama.block_count" + struct.pack("<I", 4)
            at = data.index(key) + len(key)
            path = tmp_path / "crash.gguf"
            path.write_bytes(data[:at] + struct.pack("<I", 5000) + data[at + 4 :])
        return really(name, path, **options)

    monkeypatch.setattr(job, "open_runtime", crash_on_q8)
    result = type_in(model, *RUN, "--to", "gguf-f16", "--out", tmp_path / "out", "--json", "--quiet")
    assert result.exit_code == 3
    q8, f16 = json.loads(result.stdout)["targets"]
    assert q8["verdict"] == "fail"
    assert "crashed" in q8["error"]
    assert f16["verdict"] in ("pass", "inconclusive")
    assert f16["comparisons"]["conversion"]["kl"]["mean"] < 0.001
