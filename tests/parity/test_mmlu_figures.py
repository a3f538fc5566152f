from __future__ import annotations

import numpy as np
import pytest

from mka_export.parity.mmlu.figures import Answers, Asked, Mmlu, compare_answers
from mka_export.parity.statistics import paired_change, smallest_seen

COUNT = 200


def compared(original: np.ndarray, artifact: np.ndarray, margin: float | None = 0.05) -> Mmlu:
    """Compare answers to questions of three subjects, of which the n-th has the n-th letter, going round."""
    names = ["anatomy", "astronomy", "sociology"]
    subjects, truth = zip(*((names[3 * n // COUNT], n % 4) for n in range(COUNT)), strict=True)
    asked = Asked(tuple(range(COUNT)), subjects, truth, (answers("original", original), answers("artifact", artifact)))
    return compare_answers(asked, {"compression": ("original", margin)})


def answers(name: str, chosen: np.ndarray) -> Answers:
    letters = np.full((len(chosen), 4), -5.0, dtype=np.float32)
    letters[np.arange(len(chosen)), chosen] = -0.1
    return Answers(name, "fake", "cpu", letters)


def test_gains_losses_and_what_follows_are_counted() -> None:
    truth = np.arange(COUNT) % 4
    original, artifact = truth.copy(), truth.copy()
    original[:80] = (truth[:80] + 1) % 4  # 120 right
    artifact[:68] = (truth[:68] + 2) % 4  # 12 gained; another wrong answer is no flip
    artifact[190:] = (truth[190:] + 1) % 4  # 10 lost
    found = compared(original, artifact)
    change = found.comparisons["compression"]
    assert [step.accuracy.value for step in found.steps] == [0.6, 0.61]
    assert (change.gained, change.lost, change.questions) == (12, 10, 200)
    assert change.change.value == pytest.approx(0.01)
    assert change.drop.value == pytest.approx(-0.01)
    assert change.drop.low == -change.change.high < change.drop.high == -change.change.low
    assert change.same_answer == pytest.approx(1 - 90 / 200)
    assert change.p == pytest.approx(0.8318, abs=1e-4)  # of 22 coins, 10 or fewer on one side
    assert change.informative
    assert change.questions_for_margin > COUNT
    assert [(g.name, g.questions, g.gained, g.lost) for g in found.categories] == [
        ("STEM", 67, 12, 0),
        ("social sciences", 66, 0, 10),
        ("other", 67, 0, 0),
    ]
    worst = max(found.subjects, key=lambda group: group.lost)
    assert worst.name == "sociology"
    assert worst.lost == 10
    assert worst.p == pytest.approx(2 / 2**10)
    assert worst.p < worst.q <= 3 * worst.p
    assert found.steps[0].letters == {letter: int((original == i).sum()) for i, letter in enumerate("ABCD")}


def test_a_model_that_guesses_says_nothing() -> None:
    always_b = np.ones(COUNT, dtype=int)
    right = np.arange(COUNT) % 4
    found = compared(always_b, right)
    assert found.steps[0].at_chance
    assert not found.steps[1].at_chance
    assert not found.comparisons["compression"].informative
    assert found.steps[0].letters == {"A": 0, "B": COUNT, "C": 0, "D": 0}


def test_the_same_answers_leave_an_interval_that_is_not_nothing() -> None:
    right = np.arange(COUNT) % 4
    change = compared(right, right, None).comparisons["compression"]
    assert change.change.low < 0 < change.change.high
    assert (change.p, change.same_answer, change.questions_for_margin) == (1.0, 1.0, None)
    assert 0 < change.smallest_seen < 0.03


def test_what_so_many_questions_show_they_show_as_often_as_is_said() -> None:
    """Drawn from the model that the figure is of: of 400 questions a fifth differ, more of them for the worse."""
    rng, count, differing = np.random.default_rng(3), 400, 0.2
    drop = smallest_seen(int(differing * count), count)
    lost = (differing + drop) / 2
    draws = rng.multinomial(count, [lost, differing - lost, 1 - differing], size=2000)
    shown = np.mean([paired_change(int(b), int(a), count).high < 0 for a, b, _ in draws])
    assert 0.77 < shown < 0.85
    null = rng.multinomial(count, [differing / 2, differing / 2, 1 - differing], size=2000)
    covered = np.mean([(i := paired_change(int(b), int(a), count)).low <= 0 <= i.high for a, b, _ in null])
    assert 0.94 < covered < 0.965
