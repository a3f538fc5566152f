"""While running, with little memory"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fault_tools import visible
from pico import make_pico
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

LIMITED = """
import resource, sys, torch
from pathlib import Path
import mka_export.pipeline, transformers.models.llama.modeling_llama, sklearn.cluster, matplotlib.pyplot
from mka_export.cli import main
from mka_export.pipeline.export import Export
Export.judge = lambda *_: {"error": None, "warnings": []}  # the merge is tried, not the measuring that follows it
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + int(sys.argv.pop(1)) * 2**20,) * 2)
main()
"""


@pytest.fixture(scope="session")
def wide(tmp_path_factory) -> Path:
    """A model whose MLP takes 400 MB for a batch of four windows, and 100 MB for one.

    In small shards: a map of a file counts against the limit of the address space.
    """
    folder = make_pico(tmp_path_factory.mktemp("wide") / "wide", "llama", intermediate_size=16384, num_hidden_layers=3)
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="5MB")
    (folder / "model.safetensors").unlink()
    return folder


def run_within(megabytes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LIMITED, str(megabytes), *map(str, arguments)]
    # The limit is on addresses, of which the C library sets 64 MB aside for a thread whose turn to allocate comes
    # at the wrong moment.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)


@pytest.mark.real
def test_survived_little_memory(wide, tmp_path):
    """memory does not suffice for a batch in a layer pass: smaller batches, and nearly the same result"""
    run = ["merge", wide, "--ratio", "0.3", "--protect", "1", "--method", "mka-paper", "--calibration-tokens", "2048"]
    run += ["--quiet"]
    results = {}
    for name, megabytes in (("roomy", 4000), ("narrow", 550)):
        process = run_within(megabytes, *run, "--out", tmp_path / name)
        assert process.returncode == 0, process.stderr
        results[name] = load_file(tmp_path / name / "merged" / "activations.safetensors")
    for name, tensor in results["roomy"].items():
        assert torch.allclose(tensor, results["narrow"][name], rtol=1e-3), name


def test_refused_no_memory(wide, tmp_path):
    """memory does not suffice for one window in a layer pass"""
    run = ["merge", wide, "--ratio", "0.3", "--protect", "1", "--method", "mka-paper", "--calibration-tokens", "512"]
    process = run_within(200, *run, "--out", tmp_path / "out", "--quiet")
    assert process.returncode == 1
    assert "memory" in process.stderr
    assert len(process.stderr.strip().splitlines()) == 1, process.stderr
    assert visible(tmp_path / "out") <= {"manifest.json"}
