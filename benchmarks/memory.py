"""Memory of the main job, stage by stage: a checkpoint with random weights goes through merging, conversion and its runtime.

python benchmarks/memory.py FOLDER --tokens 2048,16384                                        # Llama-3-8B's shape
python benchmarks/memory.py FOLDER --layers 12,24 --hidden 1024 --mlp 3584 --heads 16 --kv-heads 4 --vocab 32000
python benchmarks/memory.py FOLDER --layers 16 --hidden 2048 --mlp 8192 --tied --ratio 0.06 --method tail --to onnx-int4

Counted is the anonymous memory (RssAnon of Linux's /proc) of the command and all its child processes together, read
four times a second: pages of mapped model files can be dropped at any time, and do not count. Random weights say
nothing about quality, so the evaluation is as short as it can be.
"""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import click
import torch
from job import COMMAND, FINISHED
from transformers import LlamaConfig, LlamaForCausalLM

from mka_export.models.checkpoint_writer import CheckpointWriter
from mka_export.options import ITERATIVE
from mka_export.parity.runtimes import open_runtime

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from pico import pico_tokenizer

INTERVAL = 0.25  # seconds


def make_model(folder: Path, config: LlamaConfig) -> None:
    """Write a checkpoint with random weights in bfloat16, scaled so that the residual stream stays moderate."""
    shutil.rmtree(folder, ignore_errors=True)  # half-made
    folder.mkdir(parents=True)
    pico_tokenizer(folder)  # all other rows of the embedding are padding
    with torch.device("meta"):
        made = LlamaForCausalLM(config)
        shapes = {name: tensor.shape for name, tensor in made.state_dict().items()}
    for name in made.all_tied_weights_keys:
        del shapes[name]
    torch.manual_seed(0)
    with CheckpointWriter(folder) as writer:
        for name, shape in shapes.items():
            tensor = torch.empty(shape)
            if len(shape) == 1:
                tensor.fill_(1.0)
            else:
                out = name.endswith(("o_proj.weight", "down_proj.weight"))
                tensor.normal_(0, 1.0 if "embed" in name else (0.2 if out else 1.0) / shape[1] ** 0.5)
            writer.add(name, tensor.bfloat16())
    config.save_pretrained(folder)


def anonymous_bytes(pid: int) -> int:
    """Return RssAnon of a process and all its descendants."""
    total, todo = 0, [pid]
    while todo:
        process = Path("/proc") / str(todo.pop())
        try:
            lines = (process / "status").read_text().splitlines()
            todo += map(int, (process / "task" / process.name / "children").read_text().split())
        except OSError:  # it ended meanwhile
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
    return total


@dataclass
class Watched:
    """What was seen of one run.

    Attributes:
        peaks: stage, as the command names it on stderr -> (seconds, peak of anonymous memory in bytes).
    """

    seconds: float = 0.0
    peaks: dict[str, tuple[float, int]] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """The largest of all."""
        return max(peak for _, peak in self.peaks.values())

    def add(self, stage: str, seconds: float, peak: int) -> None:
        """Add one reading."""
        before, largest = self.peaks.get(stage, (0.0, 0))
        self.peaks[stage] = before + seconds, max(largest, peak)


def watch(command: list[str]) -> Watched:
    """Run a command to its end, reading its memory all the time, and print it by stage."""
    watched, stage, start = Watched(), "start", time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    said: list[str] = []

    def listen() -> None:
        nonlocal stage
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if line.startswith("  ") and line.rstrip().endswith("..."):
                stage = line.strip().removesuffix(" ...")
                print(f"  {time.monotonic() - start:7.0f} s  {stage}", file=sys.stderr, flush=True)

    listener = threading.Thread(target=listen)
    listener.start()
    last = start
    while process.poll() is None:
        with suppress(KeyboardInterrupt):  # the command has it too, and ends
            time.sleep(INTERVAL)
        now = time.monotonic()
        watched.add(stage, now - last, anonymous_bytes(process.pid))
        last = now
    listener.join()
    watched.seconds = time.monotonic() - start
    print(f"{'stage':44}  {'seconds':>8}  peak RssAnon, GB")
    for name, (seconds, peak) in watched.peaks.items():
        print(f"{name:44}  {seconds:8.0f}  {peak / 1e9:16.2f}")
    print(f"{'in all':44}  {watched.seconds:8.0f}  {watched.peak / 1e9:16.2f}\n", flush=True)
    if process.returncode not in FINISHED:  # what it finished is kept: the same command goes on there
        sys.exit(f"{shlex.join(command)}\n{''.join(said[-5:])}ended with exit code {process.returncode}")
    return watched


def numbers(_context: object, _parameter: object, value: str) -> list[int]:
    return [int(part) for part in value.split(",")]


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--layers", default="32", callback=numbers, help="One run for each, comma-separated.")
@click.option("--tokens", default="2048", callback=numbers, help="Calibration tokens; one run for each.")
@click.option("--hidden", default=4096)
@click.option("--mlp", default=14336)
@click.option("--heads", default=32)
@click.option("--kv-heads", default=8)
@click.option("--vocab", default=128256)
@click.option("--tied", is_flag=True, help="The head is the embedding.")
@click.option("--ratio", default=0.4)
@click.option("--to", default="gguf-q4")
@click.option("--method", default="mka")
@click.option("--schedule", default=ITERATIVE, help="one-shot leaves out the merges on trial, most of the time.")
def main(
    folder: Path,
    layers: list[int],
    tokens: list[int],
    hidden: int,
    mlp: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    tied: bool,
    ratio: float,
    to: str,
    method: str,
    schedule: str,
) -> None:
    """Make the models in FOLDER (kept there), run the main job on each, print a table."""
    peaks = []
    for count, budget in itertools.product(layers, tokens):
        config = LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=count,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=tied,
            dtype="bfloat16",
        )
        model = folder / f"{count}x{hidden}x{mlp}x{vocab}{'-tied' if tied else ''}"
        if not (model / "config.json").exists():  # it is written last
            make_model(model, config)
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        out = folder / f"{model.name}-{budget}"
        options = ["--ratio", str(ratio), "--to", to, "--method", method, "--device", "cpu", "--window-tokens", "64"]
        options += ["--calibration-tokens", str(budget), "--windows", "2"]
        options += ["--schedule", schedule] if schedule != ITERATIVE else []
        print(f"{count} layers, hidden {hidden}, MLP {mlp}, vocabulary {vocab}, {size / 1e9:.1f} GB of bfloat16;")
        print(f"{shlex.join(options)}\n", flush=True)
        watched = watch([*COMMAND, str(model), "--out", str(out), *options])
        peaks.append((count, budget, watched.peak))
        (target,) = json.loads((out / "report.json").read_text())["targets"]
        if target["artifact"] is None or target["comparisons"] is None:
            sys.exit(f"no artifact that runs: {target['error']}")
        kept = json.loads((out / "merged" / "config.json").read_text())["num_hidden_layers"]
        name = target["runtime"]["name"]
        with closing(open_runtime(name, Path(target["artifact"]["path"]))) as runtime:
            (ids,) = runtime.generate([[1, *range(100, 108)]], 8)
        made = f"{target['artifact']['nbytes'] / 1e9:.2f} GB, {kept} layers"
        print(f"{made}; {name} continues with the tokens {ids}\n", flush=True)
    first = peaks[0][2]
    print("layers  calibration tokens  peak RssAnon, GB  to the first")
    for count, budget, peak in peaks:
        print(f"{count:6}  {budget:18}  {peak / 1e9:16.2f}  {peak / first:12.2f}")


if __name__ == "__main__":
    main()
