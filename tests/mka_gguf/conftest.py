"""Make GGUF files from pico models, and look at them as llama.cpp does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import torch
from mka_gguf import convert
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PretrainedConfig

from mka_export.models.activations import Activations
from mka_export.models.checkpoint import Checkpoint
from mka_export.parity.runtimes.llama_cpp_runtime import AMX
from mka_export.progress import Progress
from mka_export.target import Artifact, Limits, Target

Convert = Callable[..., Artifact]
Save = Callable[..., Path]
Logprobs = Callable[[Path, Path, list[int]], tuple[NDArray[np.float64], NDArray[np.float64]]]
F32 = 0  # the type of llama.cpp's key and value cache, F16 by default


@pytest.fixture
def convert_to(tmp_path: Path) -> Convert:
    """``convert_to(folder, precision, activations, **options)``: convert into a new folder."""
    made = 0

    def run(folder: Path, precision: str, activations: Activations | None = None, **options: object) -> Artifact:
        nonlocal made
        made += 1
        out = tmp_path / f"out-{made}"
        out.mkdir()
        target = Target("pico", "a test", "gguf", precision, "llama.cpp", Limits(), Limits(), options=options)
        pieces = tmp_path / f"pieces-{made}"
        pieces.mkdir()
        quiet = Progress(quiet=True)
        checkpoint = Checkpoint.open(folder)
        return convert(checkpoint, target, out, pieces, activations=activations, calibration=None, progress=quiet)

    return run


@pytest.fixture
def edited(tmp_path: Path) -> Save:
    """``edited(folder, **changes)``: a copy of a checkpoint with other config keys."""

    def copy(folder: Path, **changes: object) -> Path:
        new = tmp_path / f"edited-{folder.name}"
        shutil.copytree(folder, new)
        config = json.loads((new / "config.json").read_text())
        (new / "config.json").write_text(json.dumps({**config, **changes}))
        return new

    return copy


@pytest.fixture
def random_model(tmp_path: Path, pico_llama: Path) -> Save:
    """``random_model(config)``: a checkpoint of any size with pico llama's tokenizer."""

    def save(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> Path:
        folder = tmp_path / "random"
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.1)
        model.save_pretrained(folder)
        for file in pico_llama.glob("*token*"):
            shutil.copy(file, folder)
        return folder

    return save


@pytest.fixture(scope="session", autouse=True)
def without_amx() -> Iterator[None]:
    """Have the Python class load models as our runtime does: see ``AMX`` there."""
    defaults = llama_cpp.llama_model_default_params

    def parameters() -> Any:
        given = defaults()
        given.use_extra_bufts = not AMX
        return given

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama_cpp.llama_cpp.llama_model_default_params", parameters)
        yield


@pytest.fixture(scope="session")
def logprobs() -> Logprobs:
    """``logprobs(artifact, folder, ids)``: log-probabilities after each token, (tokens, vocabulary), by
    llama.cpp on the artifact and by transformers, in float32, on the checkpoint.
    """

    def run(path: Path, folder: Path, ids: list[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        # the file's own YaRN settings, in whose place the Python class puts its defaults
        yarn = {"yarn_ext_factor": -1.0, "yarn_attn_factor": -1.0, "yarn_beta_fast": -1.0, "yarn_beta_slow": -1.0}
        cache = {"type_k": F32, "type_v": F32}
        llama = llama_cpp.Llama(str(path), n_ctx=512, n_batch=512, logits_all=True, verbose=False, **cache, **yarn)
        llama.eval(ids)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            reference = model(torch.tensor([ids])).logits[0]
        return _log_softmax(torch.from_numpy(np.array(llama.scores[: len(ids)]))), _log_softmax(reference)

    return run


def _log_softmax(logits: torch.Tensor) -> NDArray[np.float64]:
    array: NDArray[Any] = torch.log_softmax(logits.double(), dim=-1).numpy()
    return array


@pytest.fixture
def llama_ids() -> Callable[[Path, str], list[int]]:
    """Token ids of a text by the tokenizer inside a GGUF file, special tokens recognised, as by default."""

    def run(path: Path, text: str) -> list[int]:
        vocabulary = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        return list(vocabulary.tokenize(text.encode(), add_bos=True, special=True))

    return run
