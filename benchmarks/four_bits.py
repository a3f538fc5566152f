"""4-bit ONNX against Q4_K_M, from the same checkpoint: sizes and KL divergences, each in its runtime.

python benchmarks/four_bits.py smollm2-135m qwen2.5-coder-0.5b --text wiki.test.raw

Checkpoints that come out of a quantized GGUF file lie on that format's grid, which no other format has, and are tied or not as
that file has it. So each MODEL is first written anew as ``off_the_grid`` says: the same function of other weights.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click
import torch
from job import report_of
from torch import Tensor

from mka_export.models.checkpoint import Checkpoint
from mka_export.models.checkpoint_writer import CheckpointWriter, copy_tokenizer
from mka_export.models.sources import cache_folder, fetch, resolve
from mka_export.progress import Progress

GGUF, ONNX = "gguf-q4", "onnx-int4"


def off_the_grid(source: Checkpoint, folder: Path) -> None:
    """Write a checkpoint that computes the same from other weights.

    Every dimension that a norm hands on, a neuron's ``up`` puts out or a value head has is multiplied by a factor between
    1/√2 and √2, and what reads it by its inverse. The embedding is the head, as in the models of this size on the hub: a GGUF
    file that has both holds the head in more bits.
    """
    torch.manual_seed(0)
    roles, config = source.architecture.layer, source.config
    embedding = source.architecture.tensors["embedding"]

    def factors(count: int) -> Tensor:
        return 2.0 ** (torch.rand(count) - 0.5)

    def rescaled(index: int) -> dict[str, Tensor]:
        layer = {name: tensor.float() for name, tensor in source.layer(index).items()}
        for norm, readers in (("attention_norm", ("q", "k", "v")), ("mlp_norm", ("gate", "up"))):
            factor = factors(source.hidden_size)
            layer[roles[norm]] *= factor
            for reader in readers:
                layer[roles[reader]] /= factor
        values = factors(len(layer[roles["v"]]))
        layer[roles["v"]] *= values[:, None]
        if "v_bias" in roles:
            layer[roles["v_bias"]] *= values
        shared = config["num_attention_heads"] // config["num_key_value_heads"]
        heads = values.view(config["num_key_value_heads"], 1, -1).expand(-1, shared, -1)
        layer[roles["o"]] /= heads.flatten()
        neurons = factors(len(layer[roles["up"]]))
        layer[roles["up"]] *= neurons[:, None]
        layer[roles["down"]] /= neurons
        return layer

    folder.mkdir(parents=True)
    with CheckpointWriter(folder) as writer:
        writer.add(embedding, source.tensor(source.head))
        norm = source.architecture.tensors["norm"]
        writer.add(norm, source.tensor(norm))
        for index in range(source.num_layers):
            for name, tensor in rescaled(index).items():
                writer.add(source.architecture.layer_name(index, name), tensor)
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True, "dtype": "float32"}))
    copy_tokenizer(source.path, folder)


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--text", type=click.Path(exists=True, path_type=Path), help="To measure on. Default: our own.")
@click.option("--windows", default=8)
@click.option("--window-tokens", default=256)
def main(models: tuple[str, ...], text: Path | None, windows: int, window_tokens: int) -> None:
    """Print a table for MODELS."""
    print(f"{windows} windows of {window_tokens} tokens of {text.name if text else 'our own text'}\n")
    print("model                           target      MB      KL, nats  same top   size    KL, to Q4_K_M's")
    measured = ["--windows", windows, "--window-tokens", window_tokens, *(["--text", text] if text else [])]
    for model in models:
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint, out = Path(scratch) / "model", Path(scratch) / "out"
            fetched = fetch(resolve(model), cache_folder(), Progress(quiet=True))
            off_the_grid(Checkpoint.open(fetched.path), checkpoint)
            targets = report_of("convert", checkpoint, "--to", GGUF, "--to", ONNX, "--out", out, *measured)["targets"]
        size, divergence = targets[0]["artifact"]["nbytes"], targets[0]["comparisons"]["conversion"]["kl"]["mean"]
        for target in targets:
            nbytes, figures = target["artifact"]["nbytes"], target["comparisons"]["conversion"]
            kl, top = figures["kl"]["mean"], figures["top1"]["value"]
            print(
                f"{Path(model).stem:30}  {target['name']:9}  {nbytes / 1e6:6.1f}  {kl:8.5f}  {top:8.3f}   "
                f"{nbytes / size:.3f}   {kl / divergence:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
