"""The readers of files that nobody vouches for: one function and some sound files for each kind.

Shared by the tests, which mutate by structure, and by ``atheris_fuzz.py``, which is guided by coverage. The property is
the same: a file is accepted, or refused with an ``MkaError`` whose message is one printable line; nothing else
escapes, nothing hangs, and memory stays bounded.
"""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import mka_gguf.settings
import mka_onnx.settings
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from mka_gguf.hyperparameters import read_config
from safetensors.torch import save

from mka_export.errors import LONGEST, MkaError, WorkspaceError
from mka_export.merge.plan import read_plan
from mka_export.models.checkpoint import CONFIG, INDEX, WEIGHTS, Checkpoint
from mka_export.models.gguf_file import read_gguf
from mka_export.models.gguf_source import gguf_to_checkpoint
from mka_export.models.runner import LayerRunner
from mka_export.progress import Progress
from mka_export.target import load_target, target_names
from mka_export.verify import verify
from mka_export.workspace import FORMAT, MANIFEST, RECORD, _existing, check_ours

MEMORY = 1 << 30  # bytes beyond what the imports take
QUIET = Progress(quiet=True)
CONTENTS = b"contents"
DIGEST = hashlib.sha256(CONTENTS).hexdigest()
INPUTS = {"model": "0", "versions": {"torch": "2"}}
SETTINGS = {"gguf": mka_gguf.settings.read_settings, "onnx": mka_onnx.settings.read_settings}
LAYER = {
    "input_layernorm": (8,),
    "self_attn.q_proj": (8, 8),
    "self_attn.k_proj": (4, 8),
    "self_attn.v_proj": (4, 8),
    "self_attn.o_proj": (8, 8),
    "post_attention_layernorm": (8,),
    "mlp.gate_proj": (12, 8),
    "mlp.up_proj": (12, 8),
    "mlp.down_proj": (8, 12),
}

# Until the process ends; in memory where the system has such a folder, as a disk takes longer than the readers.
_scratch = tempfile.TemporaryDirectory(prefix="mka-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)


def refusal(kind: str, data: bytes) -> MkaError | None:
    """Give ``data`` to the reader of that kind of file; return how it was refused, or None if it was accepted."""
    try:
        READERS[kind](data)
    except MkaError as error:
        message = str(error)
        assert message.isprintable()
        assert len(message) < 12 * LONGEST  # where all characters are shown as escapes
        return error
    return None


def limit_memory() -> None:
    """Make allocations fail, from now on, that take this process further than ``MEMORY`` beyond where it is."""
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))


def _read_gguf(data: bytes) -> None:
    for tensor in read_gguf(_written("file.gguf", data)).tensors.values():
        tensor.rows(0, 1)


def _unpack_gguf(data: bytes) -> None:
    out = _scratch_folder("unpacked")
    shutil.rmtree(out)
    out.mkdir()
    gguf_to_checkpoint(_written("model.gguf", data), out, QUIET)
    Checkpoint.open(out)


def _read_weights(data: bytes) -> None:
    folder = _checkpoint("weights")
    (folder / WEIGHTS).write_bytes(data)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.parameters > 0
    assert checkpoint.vocab_size > 0
    for name in checkpoint.shards:
        assert checkpoint.tensor(name).shape == checkpoint.shapes[name]


def _read_index(data: bytes) -> None:
    folder = _checkpoint("index")
    (folder / INDEX).write_bytes(data)
    checkpoint = Checkpoint.open(folder)
    for name in checkpoint.shards:
        checkpoint.tensor(name)


def _read_config(data: bytes) -> None:
    folder = _checkpoint("config")
    (folder / CONFIG).write_bytes(data)
    checkpoint = Checkpoint.open(folder)
    LayerRunner(checkpoint).hidden_states(torch.tensor([[1, 2, 3]]))
    read_config(checkpoint)


def _read_target(data: bytes) -> None:
    target = load_target(str(_written("target.toml", data)))
    SETTINGS.get(target.converter, SETTINGS["gguf"])(target)


def _read_plan(data: bytes) -> None:
    read_plan(_written("plan.json", data)).to_dict()


def _read_manifest(data: bytes) -> None:
    folder = _written("published/merged/file", CONTENTS).parents[1]
    _written("published/merged/stage.json", b"{}")
    _written(f"published/{MANIFEST}", data)
    check_ours(folder)
    if findings := verify(folder, QUIET)[1]:
        raise WorkspaceError(str(findings))  # what the command says is listed in another form


def _read_record(data: bytes) -> None:
    stage = _written("stage/merged/file", CONTENTS).parent
    _written(f"stage/merged/{RECORD}", data)
    made, why = _existing(stage, "merged", INPUTS)
    if made is None:
        raise WorkspaceError(why)  # it is not: the stage is made again


READERS: dict[str, Callable[[bytes], None]] = {
    "gguf": _read_gguf,
    "gguf-model": _unpack_gguf,
    "safetensors": _read_weights,
    "index": _read_index,
    "config": _read_config,
    "target": _read_target,
    "plan": _read_plan,
    "manifest": _read_manifest,
    "record": _read_record,
}


@cache
def sound(kind: str) -> tuple[bytes, ...]:
    """Return files of that kind that are accepted."""
    return _SOUND[kind]()


def _written(name: str, data: bytes) -> Path:
    path = _scratch_folder(str(Path(name).parent)) / Path(name).name
    path.write_bytes(data)
    return path


@cache
def _scratch_folder(name: str) -> Path:
    folder = Path(_scratch.name) / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@cache
def _checkpoint(name: str) -> Path:
    _written(f"{name}/{CONFIG}", _json(_config()))
    return _written(f"{name}/{WEIGHTS}", save(_tensors(), {"format": "pt"})).parent


def _config() -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 16,
        "max_position_embeddings": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        "tie_word_embeddings": True,
        "bos_token_id": 1,
    }


def _tensors() -> dict[str, torch.Tensor]:
    inside = {f"model.layers.{i}.{name}.weight": torch.ones(shape) for i in range(2) for name, shape in LAYER.items()}
    return {"model.embed_tokens.weight": torch.ones(16, 8), "model.norm.weight": torch.ones(8), **inside}


def _gguf(tokenizer: str) -> bytes:
    path = _written("sound.gguf", b"")
    writer = GGUFWriter(path, "llama")
    writer.add_name("Pico")
    writer.add_languages(["en"])
    writer.add_context_length(32)
    writer.add_embedding_length(8)
    writer.add_block_count(2)
    writer.add_feed_forward_length(12)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model(tokenizer)
    writer.add_token_list(["<unk>", "<s>", "</s>", "a", "b", "ab"])
    writer.add_token_types([TokenType.UNKNOWN, *[TokenType.CONTROL] * 2, *[TokenType.NORMAL] * 3])
    writer.add_bos_token_id(1)
    writer.add_add_bos_token(True)
    if tokenizer == "gpt2":
        writer.add_tokenizer_pre("smollm")
        writer.add_token_merges(["a b"])
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(2.0)
        writer.add_rope_scaling_orig_ctx_len(16)
    else:
        writer.add_token_scores([0.0, 0.0, 0.0, -1.0, -2.0, -3.0])
        writer.add_tensor("rope_freqs.weight", np.ones(2, np.float32))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in _tensors().items():
        half = "embed" in name  # one matrix in another type
        stored = names.get_name(name, try_suffixes=(".weight",))
        kind = GGMLQuantizationType.F16 if half else GGMLQuantizationType.F32
        writer.add_tensor(stored, tensor.numpy().astype(np.float16 if half else np.float32), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def _json(data: object) -> bytes:
    return json.dumps(data).encode()


def _plan() -> dict[str, Any]:
    return {
        "format": "mka-export/merge-plan",
        "version": 1,
        "model": {"architecture": "llama", "layers": 4, "fingerprint": DIGEST},
        "method": "mka",
        "measure": "npib",
        "schedule": "iterative",
        "protect": 1,
        "calibration": {"tokens": 8},
        "steps": [
            {
                "lower": [1, 1],
                "upper": [2, 2],
                "similarity": 0.5,
                "alpha": 0.5,
                "attention": 2,
                "figures": {"loss": 0.1},
            }
        ],
    }


_SOUND: dict[str, Callable[[], tuple[bytes, ...]]] = {
    "gguf": lambda: (_gguf("gpt2"),),
    "gguf-model": lambda: (_gguf("gpt2"), _gguf("llama")),
    "safetensors": lambda: (save(_tensors(), {"format": "pt"}),),
    "index": lambda: (_json({"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(_tensors(), WEIGHTS)}),),
    "config": lambda: (_json(_config()),),
    "target": lambda: tuple(path.read_bytes() for path in target_names().values()),
    "plan": lambda: (_json(_plan()),),
    "manifest": lambda: (_json({"format": FORMAT, "model": "pico", "files": {"merged/file": DIGEST}}),),
    "record": lambda: (_json({"format": FORMAT, "inputs": INPUTS, "seconds": 1.5, "files": {"file": DIGEST}}),),
}
