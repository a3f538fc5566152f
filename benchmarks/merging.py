"""What merging costs: perplexity of merged checkpoints against the original, in torch.

python benchmarks/merging.py smollm2-135m --ratios 0.1,0.2 --methods mka,mka-paper \
        --calibration wiki.valid.txt --text wiki.test.txt --windows 32 --window-tokens 512
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import click
import numpy as np

from mka_export.inputs import CALIBRATION_WINDOW, read_texts, windows_of
from mka_export.merge.methods import METHODS
from mka_export.merge.stage import merge_stage
from mka_export.models.checkpoint import Checkpoint
from mka_export.models.runner import LayerRunner
from mka_export.models.sources import cache_folder, fetch, resolve
from mka_export.models.tokenizer import load_tokenizer
from mka_export.options import MergeOptions, TextOptions, options
from mka_export.parity.runtimes.torch_runtime import TorchRuntime
from mka_export.parity.statistics import bootstrap_means, perplexity
from mka_export.pipeline.export import merge_settings
from mka_export.progress import Progress


def losses(path: Path, ids: np.ndarray) -> np.ndarray:
    """Return the negative log-likelihood of each predicted token: (windows, tokens - 1), nats."""
    found = TorchRuntime(path, device="cpu").log_probs(ids)
    return np.array([-row[np.arange(len(w) - 1), w[1:]] for row, w in zip(found, ids, strict=True)], dtype=np.float64)


@click.command()
@click.argument("model")
@click.option("--ratios", default="0.1,0.2")
@click.option("--methods", default="mka,mka-paper")
@click.option("--schedule", default="iterative")
@click.option("--measure", default="npib")
@click.option("--protect", type=int)
@options(texts=TextOptions)
def main(
    model: str, ratios: str, methods: str, schedule: str, measure: str, protect: int | None, texts: TextOptions
) -> None:
    """Print a table: method, layers, perplexity, ratio to the original with its 95 % interval."""
    quiet, both = Progress(quiet=True), read_texts(texts)
    original = Checkpoint.open(fetch(resolve(model), cache_folder(), quiet).path)
    tokenizer = load_tokenizer(original.path)
    evaluation = windows_of(both.evaluation, tokenizer, texts.windows, texts.window_tokens)
    calibration = windows_of(both.calibration, tokenizer, None, CALIBRATION_WINDOW, texts.calibration_tokens)
    print(f"{model}: calibrated on {calibration.ids.size} tokens of {calibration.source}, {schedule}, {measure};")
    print(f"measured on {texts.windows} windows of {texts.window_tokens} tokens of {evaluation.source}\n")
    dense = losses(original.path, evaluation.ids)
    value, error = perplexity(dense)
    print("method     removed  layers  perplexity        ratio (95 %)           seconds")
    print(f"{'original':10} {0:7}  {original.num_layers:6}  {value:9.2f} ± {error:4.1f}", flush=True)
    for ratio in map(float, ratios.split(",")):
        for method in METHODS if methods == "all" else methods.split(","):
            chosen = MergeOptions(ratio=ratio, method=method, measure=measure, schedule=schedule, protect=protect)
            settings = merge_settings(chosen, original.num_layers)
            with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as pieces:
                start = time.monotonic()
                folders = Path(folder), Path(pieces)
                merge_stage(LayerRunner(original), calibration.ids, calibration.describe(), settings, *folders, quiet)
                seconds = time.monotonic() - start
                merged = losses(Path(folder), evaluation.ids)
            value, error = perplexity(merged)
            (gap,) = bootstrap_means((merged - dense).mean(axis=1, keepdims=True))
            factor = gap.exp()
            left = original.num_layers - settings.remove
            row = f"{method:10} {settings.remove:7}  {left:6}  {value:9.2f} ± {error:4.1f}"
            print(f"{row}  {factor.value:7.3f} ({factor.low:.3f} to {factor.high:.3f})  {seconds:7.0f}", flush=True)


if __name__ == "__main__":
    main()
