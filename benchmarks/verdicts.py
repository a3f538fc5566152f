"""Are the verdicts right? A known-good artifact and a known-bad one, checked on several texts.

python benchmarks/verdicts.py smollm2-135m --text wiki.test.raw

Known to be good is the model itself in float16; known to be bad is the same without the last fifth of its layers, which
chance does not make a model of (``--method tail``). Each seed is another part of the text, and no two parts share a
passage; all else is as ``mka-export check`` has it by default. Both are made once. Seconds are the clock's, and the CPU's
of all its processes, which other work on the machine changes less. Ends with 1 if a verdict was wrong.
"""

from __future__ import annotations

import itertools
import resource
import sys
import tempfile
import time
from pathlib import Path

import click
from job import report_of

GOOD, BAD = "good", "bad"
MADE = {GOOD: ["convert"], BAD: ["--ratio", "0.2", "--method", "tail"]}
EXPECTED = {GOOD: "pass", BAD: "fail"}
QUICK = ["--windows", "2", "--window-tokens", "16"]  # of the verdicts beside what is made, which nobody reads


def cpu_seconds() -> float:
    """Return what all child processes that have ended, and theirs, have computed."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def make(model: str, kind: str, folder: Path) -> Path:
    """Make an artifact, unless ``folder`` has it."""
    command, *options = MADE[kind]
    arguments = [command, model, *options] if command == "convert" else [model, command, *options]
    report = report_of(*arguments, "--to", "gguf-f16", *QUICK, "--out", folder / kind)
    return Path(report["targets"][0]["artifact"]["path"])


def parts(text: Path, count: int, folder: Path) -> list[Path]:
    """Cut a text into ``count`` files of about the same length, at ends of lines."""
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    ends = list(itertools.accumulate(map(len, lines)))
    pieces: list[list[str]] = [[] for _ in range(count)]
    for line, end in zip(lines, ends, strict=True):
        pieces[(end - 1) * count // ends[-1]].append(line)
    files = [folder / f"text-{seed}.txt" for seed in range(count)]
    for file, piece in zip(files, pieces, strict=True):
        file.write_text("".join(piece), encoding="utf-8")
    return files


@click.command()
@click.argument("model", default="smollm2-135m")
@click.option("--text", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--seeds", default=10, help="Parts of the text, each of which is evaluated on.")
@click.option("--first", default=0, help="Seed to begin with.")
@click.option("--folder", type=click.Path(path_type=Path), help="Keep artifacts and reports here. Default: nowhere.")
def main(model: str, text: Path, seeds: int, first: int, folder: Path | None) -> None:
    """Print a table for MODEL."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        artifacts = {kind: make(model, kind, folder) for kind in MADE}
        wrong, longest = [], 0.0
        print(f"{model}: {text.name} in {seeds} parts, a check at the default sampling on each\n")
        print("seed  artifact  verdict       right  seconds  of CPU  perplexity ratio to the original   runs repeated")
        for seed, part in list(enumerate(parts(text, seeds, folder)))[first:]:
            for kind, artifact in artifacts.items():
                start, used = time.perf_counter(), cpu_seconds()
                report = report_of(
                    "check", artifact, "--against", model, "--text", part, "--out", folder / f"{kind}-{seed}"
                )
                seconds, used = time.perf_counter() - start, cpu_seconds() - used
                (target,) = report["targets"]
                right = target["verdict"] == EXPECTED[kind]
                ratio, rates = target["comparisons"]["compression"]["ppl_ratio"], target["smoke"]["repetition"]
                print(
                    f"{seed:4}  {kind:8}  {target['verdict']:12}  {'yes' if right else 'NO':5}  {seconds:7.0f}  {used:6.0f}  "
                    f"{ratio['value']:.4g} ({ratio['low']:.4g} to {ratio['high']:.4g})".ljust(88)
                    + f"  {rates['original']:.2f} → {rates['artifact']:.2f}",
                    flush=True,
                )
                wrong += [] if right else [f"{kind}, seed {seed}"]
                longest = max(longest, seconds)
        print(f"\n{len(wrong)} wrong verdicts {wrong or ''}; the longest check took {longest:.0f} seconds")
        sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
