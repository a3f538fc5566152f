"""Small folders of questions, as MMLU's authors lay them out."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

SUBJECTS = {"abstract_algebra": 12, "virology": 8, "world_religions": 10}


def write_mmlu(folder: Path, subjects: Mapping[str, int] = SUBJECTS) -> Path:
    """Write ``dev/NAME_dev.csv`` with five examples and ``test/NAME_test.csv`` with as many questions as named."""
    for split in ("dev", "test"):
        (folder / split).mkdir(parents=True)
        for name, count in subjects.items():
            with (folder / split / f"{name}_{split}.csv").open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows(row(name, split, n) for n in range(5 if split == "dev" else count))
    return folder


def row(name: str, split: str, n: int) -> list[str]:
    """Return a question with its choices; the right one is the n-th letter, from A on again after D."""
    question = f'In {name.replace("_", " ")}, what is "{split}",\nnumber {n}?'
    return [question, f"{n}", f"{n + 1}", "1,5", "none of these", "ABCD"[n % 4]]
