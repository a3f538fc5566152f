"""Text data"""

from __future__ import annotations

from pathlib import Path

import pytest
from command import type_in
from fault_tools import DONE, LOOSE, MERGE, SMALL

SENTENCE = "A sentence with rather more than thirteen words in it, so that an overlap of runs is found. "
CASES: dict[str, tuple[bytes | None, tuple[str, ...]]] = {
    "the file is not there": (None, ("cannot read", "text.txt")),
    "the file is empty": (b"", ("text.txt", "empty")),
    "the file holds nothing but white space": (b" \n\t\n" * 500, ("text.txt",)),
    "the text is shorter than one window": (b"Three short words.", ("text.txt", "tokens")),
    "the text is not UTF-8": (b"caf\xe9 " * 4000, ("text.txt", "UTF-8")),
    "the text is UTF-16": ((SENTENCE * 100).encode("utf-16"), ("text.txt", "UTF-8")),
}


@pytest.mark.parametrize("option", ["--text", "--calibration"])
@pytest.mark.parametrize("fault", CASES)
def test_refused(fault, option, model, refused, tmp_path):
    data, words = CASES[fault]
    path = tmp_path / "text.txt"
    if data is not None:
        path.write_bytes(data)
    refused([model, *MERGE, "--to", "gguf-q8", "--out", "{out}", *SMALL, "--quiet", option, path], *words)


def test_refused_overlap(model, refused, tmp_path):
    """calibration and evaluation share text"""
    path = tmp_path / "text.txt"
    path.write_text(SENTENCE * 400)
    words = ("share", "--text", "--calibration")
    run = [model, *MERGE, "--to", "gguf-q8", "--out", "{out}", *SMALL, "--quiet"]
    refused([*run, "--text", path, "--calibration", path], *words, code=2)


def test_survived_one_line(model, tmp_path):
    """the text is one giant line"""
    samples = Path(__file__).parents[2] / "sample_prompts" / "evaluation"
    line = " ".join(" ".join(path.read_text(encoding="utf-8").split()) for path in sorted(samples.iterdir()))
    assert len(line) > 50_000
    (tmp_path / "line.txt").write_text(line, encoding="utf-8")
    run = [*MERGE, "--to", "gguf-q8", "--out", tmp_path / "out", *SMALL, *LOOSE, "--quiet"]
    assert type_in(model, *run, "--text", tmp_path / "line.txt").exit_code in DONE
