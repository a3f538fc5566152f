"""The wheel, built and used in a bare environment: what a user installs, without the checkout beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import pytest

from mka_export import __version__

REPOSITORY = Path(__file__).parent.parent

LOOK_AROUND = """
import json, mka_export
from importlib.metadata import entry_points, version
from mka_export.data import data_folder
from mka_export.models.architecture import architectures
from mka_export.models.catalog import catalog
from mka_export.models.text import load_text, sample_prompts, tokenizer_corpus
from mka_export.report.document import SCHEMA
from mka_export.target import load_converter, load_target, target_names
print(json.dumps({
    "package": mka_export.__file__,
    "version": version("mka-export"),
    "targets": sorted(target_names()),
    "loaded": load_target("gguf-q4").converter,
    "converters": [load_converter(name).__name__ for name in ("gguf", "onnx")],
    "entry_points": [p.name for p in entry_points(group="mka_export.converters")],
    "prompts": len(sample_prompts()),
    "corpus": len(tokenizer_corpus()),
    "texts": [len(load_text(kind, None).text) for kind in ("calibration", "evaluation")],
    "architectures": sorted(architectures()),
    "alias": "smollm2-135m" in catalog(),
    "schema": SCHEMA.is_file(),
}))
"""


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder, cwd=REPOSITORY)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel in it; the packages it depends on are lent by this one."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    run(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel, cwd=folder.parent)
    (site,) = folder.glob("lib/python*/site-packages")
    lent = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    # A folder named in a .pth file is put on the path, but its own .pth files are not read: an editable
    # install of ours stays out.
    (site / "lent.pth").write_text("\n".join(sorted(lent)) + "\n")
    return folder


@pytest.fixture(scope="module")
def seen(bare: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(bare / "bin" / "python", "-c", LOOK_AROUND, cwd=bare.parent).stdout)
    return found


def test_it_holds_the_product_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    information = f"mka_export-{__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"mka_export", "mka_gguf", "mka_onnx", information}
    wanted = ("mka_export/py.typed", "mka_export/report/report.schema.json", "mka_export/models/catalog.toml")
    page = (f"mka_export/serve/{name}" for name in ("page/index.html", "page/page.js", "npm/package-lock.json"))
    report = (
        f"mka_export/report/templates/{path.name}" for path in (REPOSITORY / "mka_export/report/templates").iterdir()
    )
    assert {*wanted, *page, *report, f"{information}/licenses/LICENSE"} <= set(names)
    assert not any("node_modules" in name for name in names)


def test_it_runs_from_where_it_was_installed(seen: dict[str, Any], bare: Path) -> None:
    assert Path(seen["package"]).is_relative_to(bare)
    assert seen["version"] == __version__


def test_the_data_came_along(seen: dict[str, Any]) -> None:
    assert seen["targets"] == sorted(path.stem for path in (REPOSITORY / "targets").glob("*.toml"))
    assert {"llama", "qwen2"} <= set(seen["architectures"])
    assert seen["prompts"] > 1
    assert seen["corpus"] > 1
    assert min(seen["texts"]) > 10_000
    assert seen["alias"]
    assert seen["schema"]


def test_the_converters_are_found_by_their_entry_points(seen: dict[str, Any]) -> None:
    assert seen["loaded"] == "gguf"
    assert {"gguf", "onnx"} <= set(seen["entry_points"])
    assert seen["converters"] == ["mka_gguf", "mka_onnx"]


def test_the_command_answers(bare: Path) -> None:
    command = bare / "bin" / "mka-export"
    assert "mka-export smollm2-135m" in run(command, "--help", cwd=bare.parent).stdout
    assert __version__ in run(command, "--version", cwd=bare.parent).stdout
    assert "gguf-q4" in run(command, "targets", cwd=bare.parent).stdout
    assert "llama3-8b" in run(command, "models", cwd=bare.parent).stdout
