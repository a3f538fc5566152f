from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from mmlu_data import SUBJECTS, row, write_mmlu

from mka_export.errors import SourceError, UsageError
from mka_export.parity.mmlu.questions import Question, load_subjects, sample
from mka_export.parity.mmlu.subjects import CATEGORIES


def test_there_are_57_subjects_in_four_categories() -> None:
    counts = {c: list(CATEGORIES.values()).count(c) for c in CATEGORIES.values()}
    assert counts == {"STEM": 18, "humanities": 13, "social sciences": 12, "other": 14}


def test_the_authors_files_are_read(tmp_path: Path) -> None:
    subjects = load_subjects(str(write_mmlu(tmp_path)))
    assert {s.name: len(s.questions) for s in subjects} == SUBJECTS
    assert [s.category for s in subjects] == ["STEM", "other", "humanities"]
    assert [len(s.examples) for s in subjects] == [5, 5, 5]
    question, *choices, answer = row("virology", "test", 6)
    assert subjects[1].questions[6] == Question(question, tuple(choices), 2)
    assert answer == "C"


def test_parquet_files_hold_the_same(tmp_path: Path) -> None:
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    expected = load_subjects(str(write_mmlu(tmp_path / "csv")))
    for subject in expected:
        folder = tmp_path / "parquet" / subject.name
        folder.mkdir(parents=True)
        for split, questions in (("dev", subject.examples), ("test", subject.questions)):
            rows = [
                {"question": q.question, "subject": subject.name, "choices": q.choices, "answer": q.answer}
                for q in questions
            ]
            half = len(rows) // 2
            for n, part in enumerate((rows[:half], rows[half:])):
                parquet.write_table(arrow.Table.from_pylist(part), folder / f"{split}-0000{n}-of-00002.parquet")
    assert load_subjects(str(tmp_path / "parquet")) == expected
    (tmp_path / "parquet" / "virology" / "test-00000-of-00002.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(SourceError, match=r"cannot read .*test-00000"):
        load_subjects(str(tmp_path / "parquet"))


def test_the_hubs_dataset_holds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_subjects(str(write_mmlu(tmp_path)))

    def load_dataset(name: str, config: str, *, split: str) -> list[dict[str, object]]:
        assert (name, config) == ("cais/mmlu", "all")
        return [
            {"question": q.question, "subject": s.name, "choices": list(q.choices), "answer": q.answer}
            for s in reversed(expected)
            for q in (s.examples if split == "dev" else s.questions)
        ]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_subjects("hub") == expected

    def offline(*_: object, **__: object) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=offline))
    with pytest.raises(SourceError, match=r"cannot read the dataset cais/mmlu: no route to host"):
        load_subjects("hub")


def test_questions_are_drawn_evenly_and_the_same_by_the_same_seed(tmp_path: Path) -> None:
    subjects = load_subjects(str(write_mmlu(tmp_path)))
    few, more = sample(subjects, 10, seed=7), sample(subjects, 26, seed=7)
    assert sorted(len(s.questions) for s in few) == [3, 3, 4]
    assert [len(s.questions) for s in more] == [9, 8, 9]  # one subject has no more than 8
    for fewer, subject, whole in zip(few, more, subjects, strict=True):
        assert set(fewer.questions) <= set(subject.questions)
        assert [q for q in whole.questions if q in subject.questions] == list(subject.questions)
        assert fewer.examples == whole.examples
    assert sample(subjects, 10, seed=7) == few
    assert sample(subjects, 10, seed=8) != few
    assert sample(subjects, 30, seed=1) == subjects
    assert len(sample(subjects, 2, seed=1)) == 2  # no subject without questions
    with pytest.raises(UsageError, match="--mmlu-questions 31: there are 30"):
        sample(subjects, 31, seed=7)


@pytest.mark.parametrize(
    ("file", "contents", "message"),
    [
        ("test/virology_test.csv", b"What?,1,2,3,4,E\n", r"virology_test.csv, row 1: expected a question"),
        ("test/virology_test.csv", b"What?,1,2,3,4,A\nWhat?,1,2,3,A\n", r"virology_test.csv, row 2: expected"),
        ("test/virology_test.csv", b"What?,1,2,3,4,\n", r"row 1: expected"),
        ("test/virology_test.csv", b"", r"virology has no test questions"),
        ("test/virology_test.csv", b"Wh\xfft?,1,2,3,4,A\n", r"virology_test.csv is no CSV file in UTF-8"),
        ("test/virology_test.csv", b'"What?,1,2,3,4,A\n', r"virology_test.csv is no CSV file"),
        ("dev/virology_dev.csv", None, r"cannot read .*virology_dev.csv: No such file"),
        ("test/virologie_test.csv", b"", r"unknown subject 'virologie': did you mean virology\?"),
    ],
)
def test_damaged_files_are_one_line(tmp_path: Path, file: str, contents: bytes | None, message: str) -> None:
    write_mmlu(tmp_path)
    if "virologie" in file:
        (tmp_path / "dev" / "virology_dev.csv").rename(tmp_path / "dev" / "virologie_dev.csv")
        (tmp_path / "test" / "virology_test.csv").rename(tmp_path / file)
    elif contents is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(contents)
    with pytest.raises(SourceError, match=message):
        load_subjects(str(tmp_path))


def test_a_folder_without_questions_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds neither"):
        load_subjects(str(tmp_path))
    with pytest.raises(UsageError, match="is no folder"):
        load_subjects(str(tmp_path / "none"))
