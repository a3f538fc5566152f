from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mka_export.errors import MkaError
from mka_export.models.text import Text, even_windows, load_text, sample_prompts, shared_ngrams, tokenizer_corpus


def test_windows_are_spread_from_start_to_end() -> None:
    windows = even_windows(range(100), 4, 10, None, "test")
    assert windows.dtype == np.int64
    np.testing.assert_array_equal(windows[:, 0], [0, 30, 60, 90])
    np.testing.assert_array_equal(windows[-1], range(90, 100))


def test_bos_takes_the_first_place_of_each() -> None:
    windows = even_windows(range(100, 200), 10, 11, 1, "test")
    assert windows.shape == (10, 11)
    assert (windows[:, 0] == 1).all()
    np.testing.assert_array_equal(windows[:, 1:].ravel(), range(100, 200))


def test_a_single_window_is_the_start() -> None:
    np.testing.assert_array_equal(even_windows(range(50), 1, 5, None, "test"), [range(5)])


@given(st.integers(2, 40), st.integers(1, 12), st.integers(0, 300), st.sampled_from([None, 7]))
def test_windows_never_overlap(tokens: int, count: int, spare: int, bos: int | None) -> None:
    body = tokens - (bos is not None)
    ids = range(1000, 1000 + body * count + spare)
    windows = even_windows(ids, count, tokens, bos, "test")
    assert windows.shape == (count, tokens)
    text = windows[:, -body:].ravel()
    assert (np.diff(text) > 0).all()  # so none overlaps, and all are in order
    assert text[0] == ids[0]
    assert count == 1 or text[-1] == ids[-1]


def test_too_short_a_text_says_what_fits() -> None:
    with pytest.raises(MkaError, match="39 tokens: 3 windows of 10 fit, 4 are wanted"):
        even_windows(range(39), 4, 10, None, "test")
    with pytest.raises(MkaError, match="0 windows"):
        even_windows([], 1, 512, 0, "test")


def test_embedded_texts_are_disjoint_and_long_enough() -> None:
    calibration, evaluation = load_text("calibration", None), load_text("evaluation", None)
    assert shared_ngrams(calibration, evaluation) == 0
    # 16 windows of 512 tokens at five bytes a token, which no tokenizer in use exceeds on mixed text.
    assert len(evaluation.text.encode()) > 16 * 512 * 5
    assert len(calibration.text.encode()) > 3 * len(evaluation.text.encode())
    assert len(sample_prompts()) >= 4
    assert len(tokenizer_corpus()) > 20


def test_overlap_is_found_whatever_the_case_and_line_breaks() -> None:
    words = "one two three four five six seven eight nine ten eleven twelve thirteen"
    assert shared_ngrams(Text("a", f"start {words} end"), Text("b", words.upper().replace(" ", "\n"))) == 1
    assert shared_ngrams(Text("a", words), Text("b", words.replace("seven", "VII"))) == 0


@pytest.mark.parametrize(
    ("contents", "message"),
    [(b"", "is empty"), (b" \n\n", "is empty"), (b"abc \xff", r"not UTF-8 \(byte 4\)"), (None, "cannot read")],
)
def test_a_text_file_that_cannot_serve_is_named(tmp_path: Path, contents: bytes | None, message: str) -> None:
    path = tmp_path / "text.txt"
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(MkaError, match=message) as error:
        load_text("calibration", path)
    assert str(path) in str(error.value)
