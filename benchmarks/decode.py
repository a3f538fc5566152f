"""Decoding speed, original depth against fewer layers, each artifact in its runtime.

python benchmarks/decode.py smollm2-135m --ratio 0.3 --to gguf-q4 --to android-arm64

Both depths of a target are loaded at once and take turns, so that other work on the machine slows both. What fewer layers
promise is counted in the weights that a token is multiplied with: those of the layers that are left, and the head's. Which
layers go plays no part in it, so the last ones do (``--method tail``), and quality is not looked at.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import numpy as np
from job import report_of

from mka_export.models.checkpoint import Checkpoint
from mka_export.models.outline import Outline
from mka_export.models.sources import cache_folder, fetch, resolve
from mka_export.parity.runtimes import Runtime, open_runtime
from mka_export.progress import Progress

QUICK = ["--windows", "2", "--window-tokens", "16"]


def make(arguments: list[str], to: tuple[str, ...], out: Path) -> list[dict[str, Any]]:
    """Run ``mka-export``; returns the report's entries of the targets."""
    targets = [word for name in to for word in ("--to", name)]
    entries: list[dict[str, Any]] = report_of(*arguments, *targets, *QUICK, "--out", out)["targets"]
    if failed := next((entry for entry in entries if entry["artifact"] is None), None):  # bad ones have a speed too
        sys.exit(f"{failed['name']}: {failed['error']}")
    return entries


def weights_per_token(model: Outline) -> int:
    """Return how many weights of matrices a token is multiplied with: all but the embedding, which is looked up, and the head."""
    tensors = model.architecture.tensors
    matrices = {name: shape for name, shape in model.shapes.items() if len(shape) == 2}
    head = matrices.pop(tensors["head"], None) or matrices[tensors["embedding"]]
    del matrices[tensors["embedding"]]
    return sum(rows * columns for rows, columns in (*matrices.values(), head))


def seconds_per_token(runtime: Runtime, prompt: list[int], tokens: int) -> float:
    """Return how long a new token takes: that of some after the first, by which the prompt has been read."""
    times = []
    for count in (1, tokens + 1):
        start = time.perf_counter()
        (ids,) = runtime.generate([prompt], count)
        times.append((time.perf_counter() - start, len(ids)))
    (first, one), (all_of_them, many) = times
    if many - one < tokens / 2:
        sys.exit(f"the model ends its text after {many} tokens: too few to time")
    return (all_of_them - first) / (many - one)


@click.command()
@click.argument("model", default="smollm2-135m")
@click.option("--ratio", default=0.3)
@click.option("--to", multiple=True, default=["gguf-q4", "android-arm64"])
@click.option("--prompt-tokens", default=32)
@click.option("--tokens", default=64, help="New tokens in each turn.")
@click.option("--turns", default=9)
@click.option("--folder", type=click.Path(path_type=Path), help="Keep the artifacts here. Default: nowhere.")
def main(
    model: str, ratio: float, to: tuple[str, ...], prompt_tokens: int, tokens: int, turns: int, folder: Path | None
) -> None:
    """Print a table for MODEL."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = folder or Path(scratch)
        deep = make(["convert", model], to, folder / "deep")
        shallow = make([model, "--ratio", str(ratio), "--method", "tail"], to, folder / "shallow")
        fetched = fetch(resolve(model), cache_folder(), Progress(quiet=True))
        outline = Outline.of_checkpoint(Checkpoint.open(fetched.path))
        left = json.loads((folder / "shallow" / "merged" / "config.json").read_text())["num_hidden_layers"]
        promise = weights_per_token(outline) / weights_per_token(outline.with_layers(left))
        prompt = np.random.default_rng(0).integers(1000, 10_000, prompt_tokens).tolist()
        print(f"{model}, {outline.num_layers} against {left} layers: {promise:.3f} times fewer weights a token;")
        print(f"{turns} turns of {tokens} tokens after {prompt_tokens}, in turn; median, and quartiles of the ratio\n")
        print("target           runtime              tokens/s deep   shallow   ratio                  of the promise")
        for one, other in zip(deep, shallow, strict=True):
            runtime = one["runtime"]["name"]
            with (
                closing(open_runtime(runtime, Path(one["artifact"]["path"]))) as before,
                closing(open_runtime(runtime, Path(other["artifact"]["path"]))) as after,
            ):
                pairs = [[seconds_per_token(each, prompt, tokens) for each in (before, after)] for _ in range(turns)]
            slow, fast = (1 / statistics.median(column) for column in zip(*pairs, strict=True))
            low, ratio_found, high = statistics.quantiles([d / s for d, s in pairs], n=4)
            print(
                f"{one['name']:15}  {runtime:19}  {slow:13.1f}  {fast:8.1f}   {ratio_found:.3f} ({low:.3f} to {high:.3f})"
                f"  {(ratio_found - 1) / (promise - 1):.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
