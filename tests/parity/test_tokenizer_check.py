from __future__ import annotations

from parity_fakes import FakeRuntime

from mka_export.parity.tokenizer_check import first_difference, without_misread

ORIGINAL = FakeRuntime([1], 1, ["one", "two", "three"])


def test_equal_ids_everywhere_are_no_difference() -> None:
    assert first_difference(ORIGINAL, ORIGINAL, ["one two", "", "three"]) is None
    assert first_difference(ORIGINAL, FakeRuntime([1], 1, ["two", "one", "three"]), []) is None


def test_the_first_differing_text_is_shown_with_ids_and_position() -> None:
    swapped = FakeRuntime([1], 1, ["one", "three", "two"])
    found = first_difference(ORIGINAL, swapped, ["one one", "one two three", "two"])
    assert found is not None
    assert (found.text, found.position) == ("one two three", 1)
    assert (found.reference, found.artifact) == ((0, 1, 2), (0, 2, 1))
    assert str(found) == ("token ids of 'one two three' differ at position 1: original [0, 1, 2], artifact [0, 2, 1]")


def test_a_missing_tail_is_a_difference() -> None:
    class Forgetful(FakeRuntime):
        def tokenize(self, text: str) -> list[int]:
            return super().tokenize(text)[:-1]

    found = first_difference(ORIGINAL, Forgetful([1], 1, ORIGINAL.vocabulary), ["one two"])
    assert found is not None
    assert found.position == 1


def test_what_a_runtime_is_known_to_misread_is_cut_out() -> None:
    texts = ["above\n \n\nbelow", "1 ½ and 2  ٣٤", "no  1", "next\x85's"]
    assert without_misread("llama.cpp", texts) == (texts, [])
    assert without_misread("onnxruntime-genai", texts) == (
        ["above", "below", "1", " and 2", "٤", "no  1", "next", "s"],
        ["\n \n\n", " ½", "  ٣", "\x85'"],
    )
