"""MMLU here against lm-evaluation-harness with its ``hf`` backend: the same answers, from how many tokens?

python benchmarks/mmlu.py qwen2.5-0.5b DATA --questions 1140

DATA is a folder with the authors' CSV files, ``dev`` and ``test``. The harness is given the same questions and examples, as
task files that read them from disk; its prompts are checked to be ours, byte for byte. Both run in torch, in float32, on the
same checkpoint. Tokens are those that went through the model, padding counted: a batch of 1 has none.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from mka_export.models.sources import cache_folder, fetch, resolve
from mka_export.models.tokenizer import leading_id, load_tokenizer, text_ids
from mka_export.parity.mmlu.answers import ask
from mka_export.parity.mmlu.prompts import Sheet, make_sheet
from mka_export.parity.mmlu.questions import Subject, load_subjects, sample
from mka_export.parity.runtimes.torch_runtime import TorchRuntime
from mka_export.progress import Progress

TASK = """task: "{name}"
dataset_path: json
dataset_kwargs:
  data_files:
    dev: {folder}/{name}-dev.jsonl
    test: {folder}/{name}-test.jsonl
test_split: test
fewshot_split: dev
fewshot_config:
  sampler: first_n
num_fewshot: {shots}
output_type: multiple_choice
description: "The following are multiple choice questions (with answers) about {words}.\\n\\n"
doc_to_text: "{{{{question.strip()}}}}\\nA. {{{{choices[0]}}}}\\nB. {{{{choices[1]}}}}\\nC. {{{{choices[2]}}}}\\nD. {{{{choices[3]}}}}\\nAnswer:"
doc_to_choice: [A, B, C, D]
doc_to_target: answer
metric_list:
  - metric: acc
"""


class Counting(HFLM):
    """The harness's backend, with its tokens counted."""

    tokens = 0

    def _model_call(self, inps: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
        self.tokens += inps.numel()
        return super()._model_call(inps, *more, **named)


def write_tasks(folder: Path, subjects: Sequence[Subject], shots: int) -> None:
    """Write a task file for each subject, and its questions."""
    for subject in subjects:
        for split, questions in (("dev", subject.examples), ("test", subject.questions)):
            lines = "".join(json.dumps(vars(each)) + "\n" for each in questions)
            (folder / f"{subject.name}-{split}.jsonl").write_text(lines, encoding="utf-8")
        words = subject.name.replace("_", " ")
        task = TASK.format(name=subject.name, folder=folder, words=words, shots=shots)
        (folder / f"{subject.name}.yaml").write_text(task, encoding="utf-8")


def theirs(model: Counting, subjects: Sequence[Subject], shots: int, folder: Path) -> tuple[list[str], list[int]]:
    """Return the harness's prompts and answers, question by question."""
    write_tasks(folder, subjects, shots)
    names = [subject.name for subject in subjects]
    tasks = TaskManager(include_path=str(folder), include_defaults=False).load(names)
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(0)
    samples = evaluate(model, tasks, bootstrap_iters=0)["samples"]
    rows = [row for name in names for row in sorted(samples[name], key=lambda row: row["doc_id"])]
    likelihoods = [[answer[0] for answer in row["filtered_resps"]] for row in rows]
    return [row["arguments"][0][0] for row in rows], [int(np.argmax(each)) for each in likelihoods]


def ours(runtime: TorchRuntime, sheet: Sheet) -> tuple[list[int], int]:
    """Return our answers, and the tokens that went through the model."""
    with tempfile.TemporaryDirectory() as pieces:
        letters = ask(runtime, sheet, Path(pieces), Progress())
    groups = sheet.groups()
    return letters.argmax(axis=1).tolist(), sum(len(g.prefix) + sum(map(len, g.rests)) for g in groups)


@click.command()
@click.argument("model")
@click.argument("data")
@click.option("--questions", default=1140, show_default=True, help="Drawn evenly from the subjects.")
@click.option("--subjects", default=57, show_default=True, help="How many, evenly spread over the list.")
@click.option("--shots", default=5, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--batch", default=1, show_default=True, help="Of the harness.")
@click.option("--device", default="cpu", show_default=True)
def main(model: str, data: str, questions: int, subjects: int, shots: int, seed: int, batch: int, device: str) -> None:
    every = load_subjects(data)
    asked = sample([every[i * len(every) // subjects] for i in range(subjects)], questions, seed)
    path = fetch(resolve(model), cache_folder(), Progress()).path
    tokenizer = load_tokenizer(path)
    leading = leading_id(tokenizer)
    runtime = TorchRuntime(path, device=device)
    harness = Counting(
        pretrained=str(path), tokenizer=tokenizer, dtype="float32", batch_size=batch, device=device, max_length=4096
    )
    sheet = make_sheet(
        asked, shots, lambda text: text_ids(tokenizer, text), [] if leading is None else [leading], harness.max_length
    )
    start = time.monotonic()
    our_answers, our_tokens = ours(runtime, sheet)
    our_seconds, start = time.monotonic() - start, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        prompts, their_answers = theirs(harness, asked, shots, Path(folder))
    their_seconds = time.monotonic() - start

    if prompts != [prompt.text for prompt in sheet.prompts]:
        raise SystemExit("the prompts differ")
    truth = np.array([prompt.answer for prompt in sheet.prompts])
    same = np.array(our_answers) == np.array(their_answers)
    named = ("mka-export", "lm-eval", "torch", "transformers")
    print(f"{model}: {questions} questions of {len(asked)} subjects, seed {seed}, {shots}-shot, {device}, float32")
    print(*(f"{name} {version(name)}," for name in named), f"{torch.get_num_threads()} threads, batch {batch}\n")
    print("                       tokens   seconds   right")
    for name, tokens, seconds, answers in (
        ("mka-export", our_tokens, our_seconds, our_answers),
        ("lm-eval, hf", harness.tokens, their_seconds, their_answers),
    ):
        print(f"{name:15} {tokens:13,} {seconds:9.0f}  {100 * np.mean(np.array(answers) == truth):5.1f} %")
    print(
        f"\nsame answer    {100 * same.mean():.2f} % ({same.sum()} of {len(same)}), on prompts that are the same bytes"
    )
    print(f"tokens         {harness.tokens / our_tokens:.2f} times fewer")
    print(f"wall clock     {their_seconds / our_seconds:.2f} times less")


if __name__ == "__main__":
    main()
