"""Do runtimes answer MMLU as torch does, and where not, was it close? From what a job has asked already.

mka-export convert qwen2.5-coder-0.5b --to gguf-f16 --to onnx-fp32 --mmlu DATA --mmlu-questions 1140 --out OUT
python benchmarks/answers.py OUT

A question's margin is by how much the original prefers its answer to the next one, in nats. A runtime's noise is how far it
shifts that margin, over the questions that it answers as torch does: a difference at a margin within it is rounding.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np

from mka_export.parity.metrics import ARTIFACT
from mka_export.pipeline.asking import read_asked


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
def main(out: Path) -> None:
    """Print a table from output folder OUT."""
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    about = report["mmlu"]
    print(
        f"{report['model']['name']}: {about['questions']} questions of {about['subjects']} subjects, {about['shots']}-shot, "
        f"seed {about['seed']}; {', '.join(f'{name} {version}' for name, version in report['tool'].items())}\n"
    )
    print(
        f"{'target':12}  {'right':>6}  {'same answer':>11}  {'noise, nats: median':>19}  {'99 %':>7}  {'largest':>7}  differences at margins of"
    )
    for target in report["targets"]:
        asked = read_asked(out, [step["name"] for step in target["mmlu"]["steps"]], target["name"])
        torch, artifact = (next(a for a in asked.answers if a.name == name) for name in ("original", ARTIFACT))
        rows, first, last = np.arange(len(torch.letters)), torch.chosen, artifact.chosen
        second = np.where(np.eye(4, dtype=bool)[first], -np.inf, torch.letters).argmax(axis=1)
        margin, kept = (each.letters[rows, first] - each.letters[rows, second] for each in (torch, artifact))
        same = first == last
        noise = np.abs(kept - margin)[same]
        median, high, largest = np.quantile(noise, [0.5, 0.99, 1])
        right = (last == np.array(asked.truth)).mean()
        differences = ", ".join(f"{value:.4f}" for value in sorted(margin[~same])) or "none"
        print(
            f"{target['name']:12}  {100 * right:5.1f}%  {100 * same.mean():10.2f}%  {median:19.5f}  {high:7.5f}  {largest:7.5f}  "
            f"{differences}"
        )
    guessing = [step for step in report["targets"][0]["mmlu"]["steps"] if step["at_chance"]]
    print(f"\nAt chance: {', '.join(step['name'] for step in guessing) or 'none'}")


if __name__ == "__main__":
    main()
