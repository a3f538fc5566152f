"""What is shown of names that strangers chose."""

from __future__ import annotations

from mka_export.errors import LONGEST, CheckpointError, printable


def test_a_name_cannot_steer_the_terminal() -> None:
    error = CheckpointError("tensor \x1b[2J\x07\u202e\ud800 is\nbad", "Fetch  it.")
    assert str(error) == r"tensor \x1b[2J\x07\u202e\ud800 is bad. Fetch it."


def test_letters_of_all_languages_are_shown() -> None:
    assert printable("Größe 大小 … 🙂") == "Größe 大小 … 🙂"


def test_an_endless_name_leaves_room_for_the_remedy() -> None:
    message = str(CheckpointError("x" * 10**6, "Fetch the file again."))
    assert len(message) < LONGEST + 10
    assert message.endswith("x. Fetch the file again.")
