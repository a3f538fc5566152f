"""Task files of lm-evaluation-harness that read local data, as on a machine without a hub."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

DOCUMENTS = [
    {"goal": f"What is {i} plus {i}?", "sol1": f"{2 * i}, of course", "sol2": f"{2 * i + 1} apples", "label": i % 2}
    for i in range(12)
]
QUESTION = 'doc_to_text: "Question: {{goal}}\\nAnswer:"\n'
PIQA = QUESTION + 'output_type: multiple_choice\ndoc_to_target: label\ndoc_to_choice: "{{[sol1, sol2]}}"\n'
LETTERS = QUESTION + 'output_type: multiple_choice\ndoc_to_target: label\ndoc_to_choice: ["A", "B", "C", "D"]\n'
ROLLING = 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{goal}} {{sol1}}"\n'
WRITTEN = (
    QUESTION + 'output_type: generate_until\ndoc_to_target: "{{sol1}}"\n'
    "generation_kwargs:\n  until: [e, t]\n  max_gen_toks: 40\n"
)
METRICS = {ROLLING: ("word_perplexity", "bits_per_byte"), WRITTEN: ("exact_match",)}


def write_task(
    folder: Path, name: str, kind: str = PIQA, documents: Sequence[Mapping[str, object]] = DOCUMENTS, more: str = ""
) -> Path:
    """Write a task file, and its data beside it; returns ``folder``."""
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in documents))
    metrics = "".join(f"  - metric: {metric}\n" for metric in METRICS.get(kind, ("acc", "acc_norm")))
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
        f"{kind}metric_list:\n{metrics}{more}"
    )
    return folder
