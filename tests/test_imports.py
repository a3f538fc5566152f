from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from importlinter import cli

REPOSITORY = Path(__file__).parent.parent


def test_nobody_imports_what_they_must_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "converters"))
    monkeypatch.chdir(REPOSITORY)
    failed = cli.lint_imports(config_filename="pyproject.toml", no_cache=True)
    assert not failed, capsys.readouterr().out


@pytest.mark.parametrize(
    "module", ["cli", "target", "data", "errors", "progress", "report", "models.sources", "serve.running"]
)
def test_light_modules_stay_light(module: str) -> None:
    """So that ``--help`` and a wrong name are answered at once."""
    code = (
        f"import sys, mka_export.{module}; print([m for m in ('torch', 'transformers', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["llama_cpp_runtime", "onnx_runtime", "genai_runtime"])
def test_the_runtimes_of_artifacts_need_no_torch(module: str) -> None:
    """Each starts in a process of its own, a second sooner without."""
    pytest.importorskip("onnxruntime_genai")
    code = f"import sys, mka_export.parity.runtimes.{module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.strip() == "False"
