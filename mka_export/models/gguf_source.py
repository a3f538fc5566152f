"""Turn a GGUF file into a Hugging Face checkpoint: config, tokenizer, and weights tensor by tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from mka_export.errors import CheckpointError, UnsupportedError
from mka_export.models.architecture import MAX_LAYERS, Architecture, architecture_of_gguf
from mka_export.models.checkpoint_writer import CheckpointWriter
from mka_export.models.gguf_file import GGUFFile, GGUFTensor, read_gguf
from mka_export.models.gguf_rope import ROPE_FACTORS, rope_parameters
from mka_export.models.gguf_tokenizer import Tokens, write_tokenizer
from mka_export.models.outline import Outline, shapes_of
from mka_export.needs import require_room
from mka_export.progress import Progress
from mka_export.publish import write_json

SLAB = 1 << 22  # values that are dequantized at a time
TOKEN_BYTES = 128  # of tokenizer files for each token of a vocabulary, with its merges
FLOAT16_MAX = torch.finfo(torch.float16).max

# Hugging Face's model card <- GGUF. The model_* keys are those that the gguf package reads back.
CARD = {
    "license": "general.license",
    "license_name": "general.license.name",
    "license_link": "general.license.link",
    "language": "general.languages",
    "tags": "general.tags",
    "model_name": "general.name",
    "model_author": "general.author",
    "model_organization": "general.organization",
    "model_version": "general.version",
    "model_finetune": "general.finetune",
    "model_basename": "general.basename",
    "model_description": "general.description",
}


def gguf_to_checkpoint(path: Path, out: Path, progress: Progress) -> None:
    """Write the model in a GGUF file as a checkpoint that plain transformers loads.

    Quantized tensors become their exact values, rounded to the checkpoint's type: float32 if all matrices
    are, bfloat16 if they are, else float16. Rows of q and k that llama.cpp stores in another order are put
    back. A sliding window, which llama.cpp leaves out for these families, bounds the context instead: up to
    there attention is the same.

    Args:
        path: the GGUF file.
        out: an existing, empty folder.
        progress: shows one step a tensor.

    Raises:
        CheckpointError: the file is damaged or incomplete, or a value does not fit in float16.
        UnsupportedError: an architecture, a tokenizer or a feature that we do not read.
        MkaError: the disk has no room for the checkpoint.
    """
    model = _read_model(path)
    file, architecture, config, dtype = model.file, model.architecture, model.config, model.dtype
    require_room(out, model.outline.nbytes, f"unpacking {path.name}", "Free space there, or use a larger disk.")
    tokens = write_tokenizer(file, out, config.max_position_embeddings)
    if len(tokens.texts) > config.vocab_size:
        raise CheckpointError(
            f"{path} has {len(tokens.texts)} tokens and {config.vocab_size} embedding rows", "Use a complete file."
        )
    _set_special(config, tokens)
    config.save_pretrained(out)
    ends = tokens.ends[0] if len(tokens.ends) == 1 else list(tokens.ends) or None
    ids = {"bos_token_id": tokens.special.get("bos"), "eos_token_id": ends, "pad_token_id": tokens.special.get("pad")}
    write_json(out / "generation_config.json", {key: value for key, value in ids.items() if value is not None})
    _write_card(file, out)
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    with progress.task(f"reading {path.name}", len(model.names)) as task, CheckpointWriter(out) as writer:
        for name, stored in model.names.items():
            tensor = _read(file.tensors[stored], dtype).reshape(model.shapes[name])
            role = architecture.roles.get(architecture.split(name)[1], "")
            if role in architecture.permuted:
                tensor = _unpermute(tensor, heads[role[0]])
            writer.add(name, tensor)
            task.advance()


def unpacked_bytes(model: Outline, nbytes: int) -> int:
    """Return the most bytes that ``gguf_to_checkpoint`` writes.

    Args:
        model: the file's, in any type.
        nbytes: of the file.
    """
    # Matrices in a type of 2 bytes, unless the file has them in 4; its tokenizer's files are larger than its own.
    return max(2 * model.parameters, nbytes) + TOKEN_BYTES * model.vocab_size


def gguf_outline(path: Path) -> Outline:
    """Return what the checkpoint made from a GGUF file will hold; only the file's header is read.

    Raises:
        CheckpointError, UnsupportedError: as ``gguf_to_checkpoint``.
    """
    return _read_model(path).outline


@dataclass(frozen=True)
class _Model:
    """What a file's header says: ``names`` maps the checkpoint's names to the file's, ``shapes`` to shapes."""

    file: GGUFFile
    architecture: Architecture
    names: Mapping[str, str]
    dtype: torch.dtype
    config: Any
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def outline(self) -> Outline:
        return Outline(self.architecture, self.config.to_dict(), self.shapes, self.dtype.itemsize)


def _read_model(path: Path) -> _Model:
    file = read_gguf(path)
    architecture = architecture_of_gguf(file.get("general.architecture", str))
    layers = _count(file, f"{architecture.gguf_arch}.block_count")
    if layers > min(len(file.tensors), MAX_LAYERS):
        raise CheckpointError(f"{path} announces {layers} layers, more than it can have", "Use a complete file.")
    names = _tensor_names(file, architecture, layers)
    dtype = _dtype(file)
    config = _config(file, architecture, names, dtype)
    return _Model(file, architecture, names, dtype, config, _check_tensors(file, config, names))


def _tensor_names(file: GGUFFile, architecture: Architecture, layers: int) -> dict[str, str]:
    """Return Hugging Face's name -> the file's name, for every tensor that the checkpoint gets."""
    arch = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[architecture.gguf_arch]
    table = gguf.get_tensor_name_map(arch, layers)
    wanted = list(architecture.tensors.values())
    wanted += [architecture.layer_name(i, name) for i in range(layers) for name in architecture.roles]
    names = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in wanted}
    found = {name: stored for name, stored in names.items() if stored is not None and stored in file.tensors}
    if unknown := sorted(set(file.tensors) - set(found.values()) - {ROPE_FACTORS}):
        more = f" and {len(unknown) - 4} more" if len(unknown) > 4 else ""
        raise UnsupportedError(
            f"{file.path} has tensors that family {architecture.name} does not: {', '.join(unknown[:4])}{more}",
            "Use a dense model of this family.",
        )
    optional = {architecture.tensors["head"], *architecture.optional.values()}
    _require_all(file, [name for name in wanted if architecture.split(name)[1] not in optional], found)
    return found


def _require_all(file: GGUFFile, wanted: Iterable[str], names: Mapping[str, str]) -> None:
    if missing := [name for name in wanted if name not in names]:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise CheckpointError(f"{file.path} lacks tensors: {', '.join(missing[:4])}{more}", "Use a complete file.")


def _dtype(file: GGUFFile) -> torch.dtype:
    kinds = {tensor.type for tensor in file.tensors.values() if len(tensor.shape) > 1}
    if kinds == {GGMLQuantizationType.F32}:
        return torch.float32
    if kinds <= {GGMLQuantizationType.BF16, GGMLQuantizationType.F32}:
        return torch.bfloat16
    return torch.float16


def _count(file: GGUFFile, key: str) -> int:
    value = file.get(key, int)
    if value < 1:
        raise CheckpointError(f"{file.path}: {key} is {value}", "The file is damaged: fetch it again.")
    return value


def _config(file: GGUFFile, architecture: Architecture, names: Mapping[str, str], dtype: torch.dtype) -> Any:
    arch = architecture.gguf_arch
    if file.find(f"{arch}.expert_count", int):
        raise UnsupportedError(f"{file.path} is a mixture of experts", "Use a dense model of this family.")
    hidden, heads = _count(file, f"{arch}.embedding_length"), _count(file, f"{arch}.attention.head_count")
    kv_heads = file.find(f"{arch}.attention.head_count_kv", int) or heads
    head_dim = file.find(f"{arch}.attention.key_length", int) or hidden // heads
    if head_dim < 2 or head_dim % 2 or kv_heads < 1 or heads % kv_heads:
        raise CheckpointError(
            f"{file.path} announces {heads} heads of width {head_dim} on {kv_heads} of keys and values",
            "Fetch the file again.",
        )
    for key in ("attention.value_length", "rope.dimension_count"):
        if (file.find(f"{arch}.{key}", int) or head_dim) != head_dim:
            raise UnsupportedError(
                f"{file.path}: {arch}.{key} is not the head's width {head_dim}", "Use another model."
            )
    context = _count(file, f"{arch}.context_length")
    embedding = file.tensors[names[architecture.tensors["embedding"]]]
    settings: dict[str, Any] = {
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": _count(file, f"{arch}.feed_forward_length"),
        "num_hidden_layers": _count(file, f"{arch}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": min(context, file.find(f"{arch}.attention.sliding_window", int) or context),
        "rms_norm_eps": _decimal(file.get(f"{arch}.attention.layer_norm_rms_epsilon", float)),
        "rope_parameters": rope_parameters(file, arch, head_dim),
        "tie_word_embeddings": architecture.tensors["head"] not in names,
        **{flag: True for flag, roles in _biases(architecture).items() if roles & _roles(architecture, names)},
    }
    if head_dim * heads != hidden:
        settings["head_dim"] = head_dim
    try:
        config = getattr(transformers, architecture.classes[0]).config_class(**settings)
    except Exception as error:  # transformers raises whatever its validators raise
        raise CheckpointError(
            f"{file.path} describes no {architecture.name} model: {error}", "Fetch the file again."
        ) from error
    config.architectures = [architecture.classes[0]]
    config.dtype = dtype
    return config


def _decimal(value: float) -> float:
    """Return the shortest decimal that is stored as this float32: 1e-05, not 9.999999747378752e-06."""
    return float(f"{value:.7g}")


def _biases(architecture: Architecture) -> dict[str, set[str]]:
    """Config flag -> the optional roles that exist where it is set."""
    flags = {
        "attention_bias": {"q_bias", "k_bias", "v_bias", "o_bias"},
        "mlp_bias": {"gate_bias", "up_bias", "down_bias"},
    }
    return {flag: roles & set(architecture.optional) for flag, roles in flags.items()}


def _roles(architecture: Architecture, names: Mapping[str, str]) -> set[str]:
    return {architecture.roles.get(architecture.split(name)[1], "") for name in names}


def _check_tensors(file: GGUFFile, config: Any, names: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Compare the file's tensors with those of an empty model of this config; return their shapes."""
    try:
        shapes = shapes_of(config)
    except CheckpointError as error:
        raise CheckpointError(f"{file.path}: {error.what}", "Fetch the file again.") from error
    _require_all(file, shapes, names)
    for name, stored in names.items():
        if file.tensors[stored].shape != shapes[name]:
            raise CheckpointError(
                f"{file.path}: tensor {stored} has shape {file.tensors[stored].shape}, its metadata say {shapes[name]}",
                "Fetch the file again.",
            )
    return shapes


def _set_special(config: Any, tokens: Tokens) -> None:
    for kind in ("bos", "eos", "pad"):
        setattr(config, f"{kind}_token_id", tokens.special.get(kind))


def _read(stored: GGUFTensor, dtype: torch.dtype) -> Tensor:
    rows, columns = math.prod(stored.shape[:-1]), stored.shape[-1]
    tensor = torch.empty((rows, columns), dtype=dtype)
    step = max(1, SLAB // columns)
    for first in range(0, rows, step):
        values = torch.from_numpy(stored.rows(first, min(first + step, rows)))
        if dtype == torch.float16 and max(map(abs, map(float, values.aminmax()))) > FLOAT16_MAX:
            raise CheckpointError(
                f"tensor {stored.name} has values that float16 cannot hold", "Use an F32 or BF16 file of the model."
            )
        tensor[first : first + step] = values
    return tensor


def _unpermute(tensor: Tensor, heads: int) -> Tensor:
    """Put the rows of a head from llama.cpp's order (rotary pairs together) back to halves.

    The inverse of ``LlamaModel.permute`` of llama.cpp's ``convert_hf_to_gguf.py``. Works on weights
    (heads x width, columns) and biases (heads x width,).
    """
    half = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, half, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _write_card(file: GGUFFile, out: Path) -> None:
    """Keep what the file says about the model in the front matter of README.md (JSON values are YAML)."""
    card = {key: file.metadata[name] for key, name in CARD.items() if file.metadata.get(name)}
    front = "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in card.items())
    kinds = ", ".join(sorted({tensor.type.name for tensor in file.tensors.values()}))
    text = f"---\n{front}---\n\n# {card.get('model_name', file.path.stem)}\n\nRead from {file.path.name} ({kinds}) by mka-export.\n"
    (out / "README.md").write_text(text, encoding="utf-8")
