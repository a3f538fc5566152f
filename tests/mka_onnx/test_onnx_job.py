"""ONNX as a user types it: beside GGUF from one merge, checked, and where its packages are missing."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import type_in
from mka_onnx import PACKAGES

from mka_export.target import target_names

SMALL = ["--windows", "4", "--window-tokens", "64", "--calibration-tokens", "512", "--device", "cpu", "--quiet"]
LOOSE = ["--max-ppl-ratio", "50"]


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


@pytest.fixture(scope="module")
def done(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[dict[str, Any]]]:
    """The output folder of a job for laptops and phones, what it printed, and what it reports of each target."""
    folder = tmp_path_factory.mktemp("job")
    phone, out = folder / "phone.toml", folder / "out"
    phone.write_text(
        'description = "a phone"\nconverter = "onnx"\nprecision = "fp32"\nruntime = "onnxruntime"\n'
        '[budget]\nmemory = "1 GB"\ncontext = 100\n'
    )
    merge = ["--ratio", "0.2", "--protect", "1", "--to", "gguf-f16", "--to", phone]
    merge += ["--to", "onnx-int8", "--to", "onnx-int4", "--attribute"]
    result = type_in(pico_llama, *merge, "--out", out, *SMALL, *LOOSE)
    assert result.exit_code in (0, 4), result.output
    return out, result.stdout, json.loads((out / "report.json").read_text())["targets"]


def test_both_formats_come_from_one_merge_and_are_measured_in_their_runtimes(done):
    out, _, (gguf, fp32, int8, _) = done
    assert [t["runtime"]["name"] for t in (gguf, fp32, int8)] == ["llama.cpp", "onnxruntime", "onnxruntime"]
    assert set(fp32["runtime"]["versions"]) == {"onnxruntime"}
    assert fp32["comparisons"]["conversion"]["kl"]["mean"] < 1e-6
    assert fp32["comparisons"]["conversion"]["kl"]["mean"] < int8["comparisons"]["conversion"]["kl"]["mean"] < 0.01
    assert fp32["tokenizer"]["identical"]
    assert all(sample["artifact"] for sample in fp32["samples"])
    assert (out / "onnx-int8" / "pico-llama-5L-int8" / "onnx" / "model_quantized.onnx").is_file()
    assert type_in("verify", out, "--quiet").exit_code == 0


def test_what_an_artifact_takes_of_a_device_is_reported(done, pico_llama):
    _, printed, (_, fp32, *_) = done
    config = json.loads((pico_llama / "config.json").read_text())
    cache = 2 * 5 * config["num_key_value_heads"] * config["head_dim"] * 4  # keys and values of five layers, float32
    taken = fp32["artifact"]["nbytes"] + 100 * cache
    assert fp32["budget"] == {"memory": 10**9, "context": 100, "taken": taken}
    assert "of 1.00 GB, with 100 tokens of context" in printed


def test_what_rounding_lost_is_told_from_what_the_runtime_does(done):
    out, _, (_, fp32, _, int4) = done
    assert [step["name"] for step in int4["steps"]] == ["original", "merged", "quantized", "artifact"]
    assert int4["steps"][2]["runtime"] == "torch"
    with (
        np.load(out / "quantized" / "onnx-int4" / "scores.npz") as rounded,
        np.load(out / "parity" / "onnx-int4" / "scores.npz") as scores,
    ):
        quantized = rounded["nll/quantized"].astype(float)
        rounding, runtime = quantized - scores["nll/merged"], scores["nll/artifact"] - quantized
    # ONNX Runtime computes what is in the folder, but for activations, which it rounds to 8 bits.
    assert 0 < 3 * np.abs(runtime).mean() < np.abs(rounding).mean()
    details = int4["artifact"]["details"]
    assert details["bits_per_weight"] != details["bits_per_weight_of_original"]  # other layers have 8 bits
    assert not list(out.rglob(".*.pieces"))
    assert [step["name"] for step in fp32["steps"]] == ["original", "merged", "artifact"]
    (warning,) = [each for each in fp32["warnings"] if "What rounding lost" in each]
    assert "the weights of pico-llama-5L-fp32 are not quantized" in warning


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


def test_missing_packages_are_said_before_any_work(model, tmp_path):
    done = without_onnx(model, "--ratio", "0.2", "--to", "onnx-int4", "--out", tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "mka-export: ONNX needs onnxruntime_genai, which is not installed. Install it: pip install 'mka-export[onnx]'."
    )
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "merged").exists()


def test_an_artifact_depends_on_all_of_onnx_that_the_builder_imports():
    (models,) = find_spec("onnxruntime_genai").submodule_search_locations
    imported = set()
    for source in Path(models, "models").rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.partition(".")[0])
    needed = {name.replace("_", "-") for name in imported if name.startswith("onnx")}
    assert {"onnx-ir", "onnxruntime"} <= needed <= {*PACKAGES}


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
