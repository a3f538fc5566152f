"""MMLU's questions: from the authors' CSV files, from parquet files as the hub has them, or from the hub; and a sample."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mka_export.errors import SourceError, UsageError, unknown_name
from mka_export.parity.mmlu.subjects import CATEGORIES

LETTERS = "ABCD"
HUB, DATASET = "hub", "cais/mmlu"  # --mmlu hub
SHOTS = 5  # examples that every subject has
REMEDY = "Give the folder that holds MMLU's dev and test, as CSV or parquet, or hub."


@dataclass(frozen=True)
class Question:
    """A question with its four choices.

    Attributes:
        question: its text.
        choices: what A, B, C and D stand for.
        answer: 0 to 3, the right one.
    """

    question: str
    choices: tuple[str, str, str, str]
    answer: int


@dataclass(frozen=True)
class Subject:
    """One of the 57.

    Attributes:
        name: as in ``CATEGORIES``.
        examples: the development questions, in their order: those that are shown with their answers.
        questions: the test questions.
    """

    name: str
    examples: tuple[Question, ...]
    questions: tuple[Question, ...]

    @property
    def category(self) -> str:
        """One of four."""
        return CATEGORIES[self.name]


def load_subjects(source: str) -> list[Subject]:
    """Load every subject that there is, by name.

    Args:
        source: ``hub``, or a folder: ``dev/NAME_dev.csv`` and ``test/NAME_test.csv`` (columns question, A, B, C, D,
            answer; no header), or ``NAME/dev-….parquet`` and ``NAME/test-….parquet`` (question, choices, answer).

    Raises:
        UsageError: there is no such folder, it holds no questions, or what reads it is not installed.
        SourceError: a file is damaged, or the hub is out of reach.
    """
    tables = _hub() if source == HUB else _folder(Path(source))
    subjects = []
    for name, (examples, questions) in sorted(tables.items()):
        if name not in CATEGORIES:
            raise SourceError(f"{source}: {unknown_name('subject', name, CATEGORIES)}", REMEDY)
        if not questions:
            raise SourceError(f"{source}: {name} has no test questions", REMEDY)
        subjects.append(Subject(name, tuple(examples), tuple(questions)))
    return subjects


def sample(subjects: Iterable[Subject], count: int, seed: int) -> list[Subject]:
    """Return the subjects with ``count`` questions together, drawn evenly: as many of each, give or take one.

    A subject with fewer gives all it has. The first k that are drawn from a subject are the same for every count, and
    stay in the order of the file.

    Raises:
        UsageError: there are not as many questions.
    """
    subjects = list(subjects)
    if (there := sum(len(subject.questions) for subject in subjects)) < count:
        raise UsageError(f"--mmlu-questions {count}: there are {there}", "Ask for fewer.")
    orders = {
        s.name: np.random.default_rng([seed, *s.name.encode()]).permutation(len(s.questions)).tolist() for s in subjects
    }
    turns = np.random.default_rng(seed).permutation(len(subjects)).tolist()  # who gives one more
    drawn: dict[str, int] = dict.fromkeys(orders, 0)
    while count:
        for subject in (subjects[i] for i in turns):
            if count and drawn[subject.name] < len(subject.questions):
                drawn[subject.name] += 1
                count -= 1
    chosen = ((s, sorted(orders[s.name][: drawn[s.name]])) for s in subjects if drawn[s.name])
    return [replace(s, questions=tuple(s.questions[i] for i in kept)) for s, kept in chosen]


Table = tuple[list[Question], list[Question]]  # development and test questions of a subject


def _folder(folder: Path) -> dict[str, Table]:
    if not folder.is_dir():
        raise UsageError(f"--mmlu {folder} is no folder", REMEDY)
    tests = {path.name.removesuffix("_test.csv"): path for path in folder.glob("test/*_test.csv")}
    if tests:
        return {name: (_csv(folder / "dev" / f"{name}_dev.csv"), _csv(path)) for name, path in tests.items()}
    tests = {path.parent.name: path for path in folder.glob("*/test-*.parquet") if path.parent.name != "all"}
    if not tests:
        raise UsageError(f"--mmlu {folder} holds neither test/*_test.csv nor */test-*.parquet", REMEDY)
    return {name: (_parquet(path.parent, "dev"), _parquet(path.parent, "test")) for name, path in tests.items()}


def _csv(path: Path) -> list[Question]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [_question(f"{path}, row {n}", row) for n, row in enumerate(csv.reader(file, strict=True), 1)]
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}", REMEDY) from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise SourceError(f"{path} is no CSV file in UTF-8: {error}", REMEDY) from error


def _question(where: str, row: list[str]) -> Question:
    if len(row) != 6 or row[5] not in LETTERS or not row[5]:
        raise SourceError(
            f"{where}: expected a question, four choices and one letter of {LETTERS}", "Correct the file."
        )
    return Question(row[0], (row[1], row[2], row[3], row[4]), LETTERS.index(row[5]))


def _parquet(folder: Path, split: str) -> list[Question]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UsageError(
            f"--mmlu {folder.parent}: parquet needs the package pyarrow", "Run: pip install 'mka-export[datasets]'"
        ) from None
    found: list[Question] = []
    for path in sorted(folder.glob(f"{split}-*.parquet")):
        try:
            rows = parquet.read_table(path).to_pylist()
        except (ArrowException, OSError) as error:
            raise SourceError(f"cannot read {path}: {' '.join(str(error).split())[:300]}", REMEDY) from error
        found += _rows(str(path), rows)
    return found


def _rows(where: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[Question]:
    for n, row in enumerate(rows, 1):
        match row:
            case {
                "question": str(question),
                "choices": [str(a), str(b), str(c), str(d)],
                "answer": 0 | 1 | 2 | 3 as answer,
            }:
                yield Question(question, (a, b, c, d), int(answer))
            case _:
                raise SourceError(f"{where}, row {n}: expected question, four choices and answer 0 to 3", REMEDY)


def _hub() -> dict[str, Table]:
    try:
        import datasets
    except ImportError:
        raise UsageError("--mmlu hub needs the package datasets", "Run: pip install 'mka-export[datasets]'") from None
    tables: dict[str, Table] = {}
    for split, place in (("dev", 0), ("test", 1)):
        try:
            rows = list(datasets.load_dataset(DATASET, "all", split=split))
        except Exception as error:  # whatever the hub's client raises
            reason = " ".join(str(error).split())[:300]
            raise SourceError(f"cannot read the dataset {DATASET}: {reason}", "Give a folder with --mmlu.") from error
        for row, question in zip(rows, _rows(f"{DATASET}, {split}", rows), strict=True):
            tables.setdefault(str(row.get("subject")), ([], []))[place].append(question)
    return tables


def prompts_sha256(prompts: Iterable[str]) -> str:
    """Return the sha256 of prompts, in order, each ended by a zero byte."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(prompt.encode() + b"\0")
    return digest.hexdigest()
