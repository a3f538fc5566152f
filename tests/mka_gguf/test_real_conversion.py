"""Real GGUF files, made into checkpoints and back: everything returns, but for the differences listed here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mka_export.models.gguf_file import read_gguf
from mka_export.models.gguf_source import gguf_to_checkpoint
from mka_export.progress import Progress

pytestmark = pytest.mark.real

# Keys that the source file lacks, for it was written by an older or sparser converter; llama.cpp's defaults
# for them are the values we write.
ADDED = {
    "tokenizer.ggml.add_eos_token": False,
    "tokenizer.ggml.add_space_prefix": False,
    "qwen2.vocab_size": 151936,  # llama.cpp reads it for no qwen2; it is the number of tokens
    "qwen2.rope.dimension_count": 64,  # hidden size / heads
    "tokenizer.ggml.unknown_token_id": 151643,  # transformers' Qwen2Tokenizer names one; byte-level BPE needs none
}
# Keys with other values. The precision is what we asked for; the size label of Qwen's file is its name's, ours is
# the number of weights counted (its head is stored beside the embedding).
CHANGED = {"general.file_type", "general.size_label"}
# llama.cpp takes a token of this spelling for an end of text, whatever type the file gives it (Qwen's has it as an
# ordinary piece): what it does is what the checkpoint says, and so our file.
END = "</s>"


@pytest.mark.parametrize("source", ["real_smollm2", "real_qwen"])
def test_there_and_back(source, request, tmp_path, convert_to):
    path: Path = request.getfixturevalue(source)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    gguf_to_checkpoint(path, folder, Progress(quiet=True))
    artifact = convert_to(folder, "f16")
    old, new = read_gguf(path), read_gguf(artifact.path)

    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"
    assert set(new.tensors) == set(old.tensors)
    for name, tensor in old.tensors.items():
        ours, rows = new.tensors[name], len(tensor.data)
        assert ours.shape == tensor.shape, name
        assert ours.type.name == ("F32" if len(tensor.shape) == 1 else "F16"), name
        # All tensors pass through the checkpoint's float16; vectors are then stored as float32.
        rounded = tensor.rows(0, rows).astype(np.float16).astype(np.float32)
        assert np.array_equal(ours.rows(0, rows), rounded), name

    theirs, found = old.metadata, new.metadata
    added = {name: found[name] for name in set(found) - set(theirs)}
    assert added == {name: ADDED.get(name) for name in added}
    assert set(theirs) <= set(found)
    types = "tokenizer.ggml.token_type"
    assert {name for name in theirs if found[name] != theirs[name]} <= CHANGED | {types}
    other = {i for i, (a, b) in enumerate(zip(theirs[types], found[types], strict=True)) if a != b}
    assert {theirs["tokenizer.ggml.tokens"][i] for i in other} <= {END}


def test_smollm2_falls_back(real_smollm2, tmp_path, convert_to):
    """576 columns are no multiple of 256: of q4_k_m only ffn_down (1536) stays a k-quant."""
    gguf_to_checkpoint(real_smollm2, tmp_path, Progress(quiet=True))
    details = convert_to(tmp_path, "q4_k_m").details
    assert details["fallback_types"] == {"Q5_0": 166, "Q8_0": 15}
    assert details["types"]["Q4_K"] + details["types"]["Q6_K"] == 30
    assert 0.75 < details["fallback_share"] < 0.85
