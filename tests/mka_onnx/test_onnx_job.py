"""ONNX as a user types it: beside GGUF from one merge, checked, and where its packages are missing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from mka_onnx import PACKAGES

from mka_export.cli import main
from mka_export.target import target_names

SMALL = ["--windows", "4", "--window-tokens", "64", "--calibration-tokens", "512", "--device", "cpu", "--quiet"]
LOOSE = ["--max-ppl-ratio", "50"]


def type_in(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def without_onnx(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command where only ``pip install mka-export`` was done."""
    code = (
        "import sys; sys.modules |= dict.fromkeys(('onnx', 'onnx_ir', 'onnxscript', 'onnxruntime', 'onnxruntime_genai'));"
        "from mka_export.cli import main; main()"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


@pytest.fixture
def model(pico_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pico_llama, tmp_path / "pico"))


def test_both_formats_come_from_one_merge_and_are_measured_in_their_runtimes(model, tmp_path):
    out = tmp_path / "out"
    merge = ["--ratio", "0.2", "--protect", "1", "--to", "gguf-f16", "--to", "onnx-fp32", "--to", "onnx-int8"]
    result = type_in(model, *merge, "--out", out, *SMALL, *LOOSE, "--json")
    assert result.exit_code in (0, 4), result.output
    gguf, fp32, int8 = json.loads(result.stdout)["targets"]
    assert [t["runtime"]["name"] for t in (gguf, fp32, int8)] == ["llama.cpp", "onnxruntime", "onnxruntime"]
    assert set(fp32["runtime"]["versions"]) == {"onnxruntime"}
    assert fp32["comparisons"]["conversion"]["kl"]["mean"] < 1e-6
    assert fp32["comparisons"]["conversion"]["kl"]["mean"] < int8["comparisons"]["conversion"]["kl"]["mean"] < 0.01
    assert fp32["tokenizer"]["identical"]
    assert all(sample["artifact"] for sample in fp32["samples"])
    assert (out / "onnx-int8" / "pico-5L-int8" / "onnx" / "model_quantized.onnx").is_file()
    assert type_in("verify", out, "--quiet").exit_code == 0


def test_what_an_artifact_takes_of_a_device_is_reported(model, tmp_path):
    target = tmp_path / "phone.toml"
    target.write_text(
        'description = "a phone"\nconverter = "onnx"\nprecision = "fp32"\nruntime = "onnxruntime"\n'
        '[budget]\nmemory = "1 GB"\ncontext = 100\n[compression]\nmax_ppl_ratio = 50\n'
    )
    out = tmp_path / "out"
    result = type_in(model, "--ratio", "0.2", "--protect", "1", "--to", target, "--out", out, *SMALL)
    assert result.exit_code in (0, 4), result.output
    (entry,) = json.loads((out / "report.json").read_text())["targets"]
    config = json.loads((model / "config.json").read_text())
    cache = 2 * 5 * config["num_key_value_heads"] * config["head_dim"] * 4  # keys and values of five layers, float32
    assert entry["budget"] == {
        "memory": 10**9,
        "context": 100,
        "taken": entry["artifact"]["nbytes"] + 100 * cache,
    }
    assert "of 1.00 GB, with 100 tokens of context" in result.stdout


def test_anybodys_folder_is_checked(model, convert_to, pico_llama, tmp_path):
    result = type_in(
        "check",
        convert_to(pico_llama, "fp32").path,
        "--against",
        model,
        "--out",
        tmp_path / "check",
        *SMALL,
        *LOOSE,
        "--json",
    )
    assert result.exit_code in (0, 4), result.output
    (target,) = json.loads(result.stdout)["targets"]
    files = {file["path"] for file in target["artifact"]["files"]}
    assert {"pico-llama-fp32/genai_config.json", "pico-llama-fp32/onnx/model.onnx_data"} <= files


@pytest.mark.parametrize("command", ["run", "doctor"])
def test_missing_packages_are_said_before_any_work(command, model, tmp_path):
    out = ["--out", tmp_path / "out"] if command == "run" else []
    done = without_onnx(command, model, "--ratio", "0.2", "--to", "onnx-int4", *out)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "mka-export: ONNX needs onnxruntime_genai, which is not installed. Install it: pip install 'mka-export[onnx]'."
    )
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "merged").exists()


def test_an_artifact_depends_on_all_of_onnx_that_the_builder_loads():
    code = (
        "import sys; import onnxruntime_genai.models.builder; print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    modules = [name for name in done.stdout.splitlines()[-1].split() if name.startswith("onnx")]
    loaded = {package for name in modules for package in packages_distributions().get(name, [])}
    assert {"onnx", "onnxruntime"} <= loaded <= {*PACKAGES}


def test_targets_say_which_need_missing_packages(model):
    done = without_onnx("targets", "--for", model)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert len(lines) == len(target_names())
    assert all(("onnxruntime_genai, which is not installed" in line) == ("llama.cpp" not in line) for line in lines)


def test_a_missing_runtime_is_one_line(model, convert_to, pico_llama, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "mka_export.parity.runtimes.onnx_runtime", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = type_in(
        "check", convert_to(pico_llama, "fp32").path, "--against", model, "--out", tmp_path / "check", *SMALL, "--json"
    )
    assert result.exit_code == 3
    (target,) = json.loads(result.stdout)["targets"]
    assert "onnxruntime cannot be loaded" in target["error"]
    assert "pip install 'mka-export[onnx]'" in target["error"]
