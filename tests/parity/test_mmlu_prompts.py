from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from mmlu_data import write_mmlu
from parity_fakes import FakeRuntime, random_runtime

from mka_export.errors import UnsupportedError, UsageError
from mka_export.models.tokenizer import load_tokenizer, text_ids
from mka_export.parity.mmlu.answers import ask
from mka_export.parity.mmlu.prompts import letter_ids, make_sheet
from mka_export.parity.mmlu.questions import Subject, load_subjects, sample
from mka_export.parity.mmlu.subjects import CATEGORIES
from mka_export.progress import Progress

PROMPT = """The following are multiple choice questions (with answers) about world religions.

In world religions, what is "dev",
number 0?
A. 0
B. 1
C. 1,5
D. none of these
Answer: A

In world religions, what is "dev",
number 1?
A. 1
B. 2
C. 1,5
D. none of these
Answer: B

In world religions, what is "test",
number 3?
A. 3
B. 4
C. 1,5
D. none of these
Answer:"""


def few_tokens(text: str) -> list[int]:
    """A tokenizer with seven tokens."""
    letter = [3 + ord(text[-1]) % 4] if text[-2] == " " else []
    whole = text[: -2 * len(letter)] if letter else text
    return [len(whole) % 3, len(whole) % 7, *letter]


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> list[Subject]:
    return load_subjects(str(write_mmlu(tmp_path_factory.mktemp("mmlu"))))


def characters(text: str) -> list[int]:
    return [ord(c) for c in text]


def pairs(text: str) -> list[int]:
    """A tokenizer for which a letter and the space before it are one token."""
    ids: list[int] = []
    for c in text:
        if ids and ids[-1] == ord(" "):
            ids[-1] = 1000 + ord(c)
        else:
            ids.append(ord(c))
    return ids


def test_a_prompt_is_worded_as_the_authors_have_it(subjects: list[Subject]) -> None:
    sheet = make_sheet(subjects, 2, pairs, [], 10_000)
    prompt = next(p for p in sheet.prompts if p.subject == "world_religions" and "number 3" in p.text)
    assert prompt.text == PROMPT
    assert prompt.ids == tuple(pairs(PROMPT))
    assert prompt.answer == 3
    assert sheet.letters == tuple(1000 + ord(c) for c in "ABCD")
    assert "dev" not in make_sheet(subjects, 0, pairs, [], 10_000).prompts[0].text


def test_what_a_subjects_prompts_begin_with_is_taken_apart_once(subjects: list[Subject]) -> None:
    sheet = make_sheet(subjects, 5, pairs, [7], 10_000)
    groups = sheet.groups()
    assert [len(group.rests) for group in groups] == [12, 8, 10]
    together = [(*group.prefix, *rest) for group in groups for rest in group.rests]
    assert together == [prompt.ids for prompt in sheet.prompts]
    assert all(len({rest[0] for rest in group.rests}) > 1 for group in groups)  # no more could be shared
    (alone,) = make_sheet(sample(subjects, 1, 0), 5, pairs, [7], 10_000).groups()
    assert len(alone.rests) == 1
    assert len(alone.rests[0]) == 1


def test_examples_that_do_not_fit_the_context_are_left_out(subjects: list[Subject]) -> None:
    whole = make_sheet(subjects, 5, pairs, [], 10_000)
    longest = max(len(prompt.ids) for prompt in whole.prompts)
    fitted = make_sheet(subjects, 5, pairs, [], longest - 1)
    assert {p.text.count('"dev"') for p in fitted.prompts} == {4, 5}
    assert all(len(p.ids) < longest and p.text.endswith("Answer:") for p in fitted.prompts)
    with pytest.raises(UsageError, match="the model takes 20"):
        make_sheet(subjects, 5, pairs, [], 20)
    with pytest.raises(UsageError, match="--mmlu-shots 6: abstract_algebra has 5 examples"):
        make_sheet(subjects, 6, pairs, [], 10_000)


@pytest.mark.parametrize("tokenize", [characters, lambda text: pairs(text) if text[-1] == ":" else [9]])
def test_letters_that_are_no_tokens_of_their_own_are_refused(tokenize: object, subjects: list[Subject]) -> None:
    with pytest.raises(UnsupportedError, match="the letters A to D are not one token each"):
        make_sheet(subjects, 0, tokenize, [], 10_000)  # type: ignore[arg-type]


def test_letters_of_real_tokenizers(pico_llama: Path, subjects: list[Subject]) -> None:
    tokenizer = load_tokenizer(pico_llama)
    letters = letter_ids(lambda text: text_ids(tokenizer, text), "Answer:")
    assert [tokenizer.decode([i]) for i in letters] == [" A", " B", " C", " D"]


def test_a_killed_measurement_goes_on_where_it_was(tmp_path: Path, subjects: list[Subject]) -> None:
    many = [replace(s, name=name) for s, name in zip(subjects * 4, sorted(CATEGORIES), strict=False)]
    sheet = make_sheet(many, 1, few_tokens, [], 9)
    asked = []

    class Counted(FakeRuntime):
        def next_log_probs(self, texts, tokens):  # type: ignore[no-untyped-def]
            asked.extend(texts)
            if len(asked) == 8 + dies:
                raise KeyboardInterrupt
            return super().next_log_probs(texts, tokens)

    runtime, dies = Counted(random_runtime(3).distribution, 7), 4
    with pytest.raises(KeyboardInterrupt):
        ask(runtime, sheet, tmp_path, Progress(quiet=True))
    dies = -1
    asked.clear()
    found = ask(runtime, sheet, tmp_path, Progress(quiet=True))
    assert len(asked) == 4
    assert found.shape == (len(sheet.prompts), 4)
    asked.clear()
    (other := tmp_path / "other").mkdir()
    assert (ask(runtime, sheet, other, Progress(quiet=True)) == found).all()
