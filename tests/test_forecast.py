"""What a job is said to take, against what it takes."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from command import type_in
from mka_gguf.settings import PRECISIONS
from pico import make_pico

from mka_export.models.checkpoint import Checkpoint
from mka_export.models.outline import Outline
from mka_export.needs import GB, Need, disk_peak, free_bytes, require_room
from mka_export.parity.runtimes import RUNTIMES
from mka_export.pipeline import forecast
from mka_export.target import Limits, Target, load_converter

SMALL = ["--windows", "4", "--window-tokens", "64", "--calibration-tokens", "2048", "--device", "cpu", "--quiet"]
LOOSE = ["--max-ppl-ratio", "50", "--conversion-max-mean-kl", "5", "--conversion-max-ppl-ratio", "50"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A model large enough that its weights outweigh file headers: 13 MB."""
    return make_pico(
        tmp_path_factory.mktemp("wide") / "wide", "llama", hidden_size=256, intermediate_size=512, num_hidden_layers=5
    )


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """Yield a list to which the sizes of all files in ``folder`` are added while the block runs."""
    seen, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.is_set():
            total = 0
            for inside, _, names in os.walk(folder):
                for name in names:
                    with suppress(OSError):  # gone meanwhile
                        total += Path(inside, name).stat().st_size
            seen.append(total)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        ended.set()
        watcher.join()


def test_the_disk_is_never_fuller_than_forecast(wide, tmp_path):
    out = tmp_path / "out"
    command = [wide, "--ratio", "0.4", "--protect", "1", "--to", "gguf-q4", "--out", out, *SMALL, *LOOSE]
    told = json.loads(type_in(*command, "--dry-run", "--json").stdout)
    assert not out.exists()
    with watched(out) as seen:
        assert type_in(*command).exit_code in (0, 3, 4)
    needed = told["disks"][str(out)]["needed"]
    assert 0.5 * needed < max(seen) <= needed
    merged = sum(p.stat().st_size for p in (out / "merged").glob("*.safetensors"))
    assert merged == pytest.approx(told["stages"]["merged"]["kept"], rel=0.02)
    again = json.loads(type_in(*command, "--dry-run", "--json").stdout)
    assert again["disks"][str(out)]["needed"] == 0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_artifact_is_not_larger_than_forecast_and_not_much_smaller(precision, wide, tmp_path):
    from mka_export.progress import Progress

    checkpoint, converter = Checkpoint.open(wide), load_converter("gguf")
    target = Target("t", "", "gguf", precision, "llama.cpp", Limits(), Limits())
    (tmp_path / "out").mkdir()
    (tmp_path / "pieces").mkdir()
    need = converter.need(Outline.of_checkpoint(checkpoint), target)
    folders = tmp_path / "out", tmp_path / "pieces"
    made = converter.convert(
        checkpoint, target, *folders, activations=None, calibration=None, progress=Progress(quiet=True)
    )
    assert made.nbytes <= need.kept < 1.2 * made.nbytes + 1_200_000
    scratch = sum(path.stat().st_size for path in folders[1].iterdir())
    assert scratch <= need.scratch <= 1.1 * scratch + 1_200_000


@pytest.mark.parametrize("command", ["run", "merge", "convert", "doctor"])
def test_looking_ahead_makes_and_fetches_nothing(command, tmp_path, monkeypatch):
    monkeypatch.setenv("MKA_EXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    asked = {
        "run": ["llama3-8b", "--ratio", "0.4", "--to", "gguf-q4", "--dry-run"],
        "merge": ["merge", "llama3-8b", "--ratio", "0.4", "--dry-run"],
        "convert": ["convert", "llama3-8b", "--to", "gguf-q4", "--dry-run"],
        "doctor": ["doctor", "llama3-8b", "--ratio", "0.4", "--to", "gguf-q4"],
    }[command]
    result = type_in(*asked, "--json")
    told = json.loads(result.stdout)
    job = told["job"] if command == "doctor" else told
    assert job["model"] == {"family": "llama", "layers": 32, "parameters": 8_030_261_248, "nbytes": 16_060_522_496}
    assert job["layers"] == (32 if command == "convert" else 19)
    assert job["stages"]["fetch"]["kept"] == 16_060_522_496
    assert result.exit_code == (1 if job["shortfalls"] else 0)
    if command == "doctor":
        assert told["machine"]["runtimes"]["torch"]["error"] is None
        assert told["machine"]["memory"]["total"] > told["machine"]["memory"]["free"] > 0
    assert list(tmp_path.iterdir()) == []


def test_what_was_made_with_other_settings_is_to_be_made_again(wide, tmp_path, update):
    asked = [wide, "--protect", "1", "--to", "gguf-q8", "--out", tmp_path / "out", *SMALL, *LOOSE]
    assert type_in(*asked, "--ratio", "0.4").exit_code in (0, 4)

    def left(*arguments: object) -> set[str]:
        stages = json.loads(type_in(*asked, *arguments, "--dry-run", "--json").stdout)["stages"]
        return {name for name, need in stages.items() if any(need.values())}

    assert left("--ratio", "0.4") == set()
    assert left("--ratio", "0.2") == {"merged", "gguf-q8", "parity/gguf-q8"}
    assert left("--ratio", "0.4", "--max-fallback", "0.9") == {"gguf-q8", "parity/gguf-q8"}
    assert left("--ratio", "0.4", "--to", "gguf-f16") == {"gguf-f16", "parity/gguf-f16"}
    update("gguf")
    assert left("--ratio", "0.4") == {"gguf-q8", "parity/gguf-q8"}


def test_what_is_too_little_is_said(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(forecast, "free_memory", lambda: GB)
    result = type_in("llama3-8b", "--ratio", "0.4", "--to", "gguf-q4", "--dry-run")
    assert result.exit_code == 1
    assert "32 → 19 layers by mka" in result.stdout
    assert "Memory    of all processes together: needs" in result.stdout
    assert "NOT ENOUGH" in result.stdout


def test_a_job_that_may_lack_memory_says_so_and_goes_on(wide, monkeypatch, tmp_path):
    monkeypatch.setattr(forecast, "free_memory", lambda: 1000)
    result = type_in("merge", wide, "--ratio", "0.2", "--protect", "1", "--out", tmp_path / "out", *SMALL[:-1])
    assert result.exit_code == 0
    assert "of memory, where 0.0 MB are free: it may become slow, or fail" in result.stderr


def test_doctor(monkeypatch):
    monkeypatch.setitem(RUNTIMES, "broken", "mka_export.no_such_module")
    result = type_in("doctor")
    assert result.exit_code == 1
    assert "llama.cpp: cpu (" in result.stdout
    assert "broken: ModuleNotFoundError: No module named 'mka_export.no_such_module'" in " ".join(result.stdout.split())
    assert "Formats   gguf" in result.stdout


def test_doctor_refuses_a_target_without_a_model():
    result = type_in("doctor", "--to", "gguf-q4")
    assert result.exit_code == 2
    assert "are for a MODEL" in result.stderr


def test_stages_share_the_disk_one_after_another():
    assert disk_peak([Need(kept=5, scratch=3), Need(kept=1, scratch=9), Need(kept=1)]) == 15
    assert disk_peak([]) == 0


def test_room_is_looked_for_on_the_disk_of_a_folder_to_be(tmp_path):
    folder = tmp_path / "not" / "there"
    assert free_bytes(folder) == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    require_room(folder, 10, "a thing", "")
    assert not folder.exists()
