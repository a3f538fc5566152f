"""How two models answer the same questions: accuracy, what was gained and lost, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mka_export.parity.mmlu.answers import LogLetters
from mka_export.parity.mmlu.questions import LETTERS
from mka_export.parity.mmlu.subjects import CATEGORIES
from mka_export.parity.statistics import (
    Interval,
    at_chance,
    cases_for,
    false_discoveries,
    mcnemar,
    paired_change,
    share,
    smallest_seen,
)

Numbers = NDArray[np.intp]


@dataclass(frozen=True)
class Answers:
    """One model's answers.

    Attributes:
        name: the step's: ``original``, ``merged``, ``healed``, ``artifact``.
        runtime: the runtime it was asked in.
        device: where that computed.
        letters: (questions, 4) log-probabilities.
    """

    name: str
    runtime: str
    device: str
    letters: LogLetters

    @property
    def chosen(self) -> Numbers:
        """The answers, 0 to 3; the first of two that are as likely."""
        chosen: Numbers = self.letters.argmax(axis=1)
        return chosen


@dataclass(frozen=True)
class Step:
    """What one model knows.

    Attributes:
        name, runtime, device: those of its answers.
        accuracy: share of right answers.
        letters: how often each was answered.
        at_chance: it answers no better than by guessing.
    """

    name: str
    runtime: str
    device: str
    accuracy: Interval
    letters: Mapping[str, int]
    at_chance: bool


@dataclass(frozen=True)
class Change:
    """The artifact's answers against those of a reference.

    Attributes:
        against: the reference's step.
        questions: that both were asked.
        change: accuracy of the artifact less that of the reference.
        gained, lost: questions that only the artifact, or only the reference, answers right.
        same_answer: share of questions with the same answer, right or wrong.
        p: of McNemar's exact test that there is no change.
        smallest_seen: the smallest change that so many questions show in 8 of 10 cases.
        margin: the drop that is allowed, if any.
        questions_for_margin: how many would show a drop of the margin as often.
        informative: whether the reference is better than chance; else this says nothing.
    """

    against: str
    questions: int
    change: Interval
    gained: int
    lost: int
    same_answer: float
    p: float
    smallest_seen: float
    margin: float | None
    questions_for_margin: int | None
    informative: bool

    @property
    def drop(self) -> Interval:
        """What was lost: the change, turned round."""
        value, low, high = (0.0 - x for x in (self.change.value, self.change.high, self.change.low))  # 0 has no sign
        return Interval(value, low, high)


@dataclass(frozen=True)
class Group:
    """A subject or a category: the artifact against the original.

    Attributes:
        name, category: of the group; a category is its own.
        questions: in it.
        original, artifact: their accuracies.
        gained, lost, p: as for ``Change``.
        q: p, with the rate of false discoveries controlled over all groups of the list.
    """

    name: str
    category: str
    questions: int
    original: Interval
    artifact: Interval
    gained: int
    lost: int
    p: float
    q: float


@dataclass(frozen=True)
class Mmlu:
    """Everything about one artifact's answers.

    Attributes:
        steps: the models, from the original to the artifact.
        comparisons: kind of comparison -> the artifact's change from its reference.
        categories, subjects: the artifact against the original, in groups.
    """

    steps: tuple[Step, ...]
    comparisons: Mapping[str, Change]
    categories: tuple[Group, ...]
    subjects: tuple[Group, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the field ``mmlu`` of a report's target."""
        return asdict(self)


@dataclass(frozen=True)
class Asked:
    """What a model and those that were made from it answered to the same questions.

    Attributes:
        numbers: of each question, in the order of all that are asked.
        subjects: what it is about.
        truth: its right answer, 0 to 3.
        answers: of the models, from the original to the artifact.
    """

    numbers: tuple[int, ...]
    subjects: tuple[str, ...]
    truth: tuple[int, ...]
    answers: tuple[Answers, ...]

    @classmethod
    def join(cls, parts: Sequence[Asked]) -> Asked:
        """Return the answers to the questions of several parts, in their order."""
        rows = [row for part in parts for row in zip(part.numbers, part.subjects, part.truth, strict=True)]
        order = np.argsort([number for number, *_ in rows])
        numbers, subjects, truth = zip(*(rows[i] for i in order), strict=True)
        answers = tuple(
            replace(several[0], letters=np.concatenate([each.letters for each in several])[order])
            for several in zip(*(part.answers for part in parts), strict=True)
        )
        return cls(numbers, subjects, truth, answers)

    @property
    def right(self) -> dict[str, NDArray[np.float64]]:
        """1 for each question that a step answers right, else 0."""
        return {each.name: (each.chosen == np.array(self.truth)).astype(np.float64) for each in self.answers}


def compare_answers(asked: Asked, references: Mapping[str, tuple[str, float | None]]) -> Mmlu:
    """Compare the artifact's answers with those of the models it comes from.

    Args:
        references: kind of comparison -> the step it is made with, and the drop that is allowed.
    """
    truth, subjects, answers = np.array(asked.truth), asked.subjects, asked.answers
    chosen = {each.name: each.chosen for each in answers}
    original, artifact = answers[0].name, answers[-1].name
    steps = {each.name: _step(each, truth) for each in answers}
    by_subject = [(name, CATEGORIES[name]) for name in dict.fromkeys(subjects)]
    by_category = [(name, name) for name in dict.fromkeys(CATEGORIES.values())]
    pair = chosen[original] == truth, chosen[artifact] == truth
    return Mmlu(
        tuple(steps.values()),
        {
            kind: _change(steps[name], chosen[name], chosen[artifact], truth, margin)
            for kind, (name, margin) in references.items()
        },
        _groups(by_category, [CATEGORIES[name] for name in subjects], *pair),
        _groups(by_subject, subjects, *pair),
    )


def _step(answers: Answers, truth: Numbers) -> Step:
    chosen = answers.chosen
    right = int((chosen == truth).sum())
    letters = {letter: int((chosen == i).sum()) for i, letter in enumerate(LETTERS)}
    chance = at_chance(right, len(truth), len(LETTERS))
    return Step(answers.name, answers.runtime, answers.device, share(right, len(truth)), letters, chance)


def _change(reference: Step, before: Numbers, after: Numbers, truth: Numbers, margin: float | None) -> Change:
    gained, lost, count = *_flips(before == truth, after == truth), len(truth)
    return Change(
        reference.name,
        count,
        paired_change(gained, lost, count),
        gained,
        lost,
        float((before == after).mean()),
        mcnemar(gained, lost),
        smallest_seen(gained + lost, count),
        margin,
        cases_for(margin, gained + lost, count) if margin else None,
        not reference.at_chance,
    )


def _flips(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> tuple[int, int]:
    return int((after & ~before).sum()), int((before & ~after).sum())


def _groups(
    names: Sequence[tuple[str, str]], members: Sequence[str], before: NDArray[np.bool_], after: NDArray[np.bool_]
) -> tuple[Group, ...]:
    belongs = np.array(members)
    masks = [(name, category, belongs == name) for name, category in names if name in members]
    flips = [_flips(before[mask], after[mask]) for *_, mask in masks]
    p = [mcnemar(*each) for each in flips]
    return tuple(
        Group(
            name,
            category,
            count := int(mask.sum()),
            share(int(before[mask].sum()), count),
            share(int(after[mask].sum()), count),
            *flip,
            chance,
            adjusted,
        )
        for (name, category, mask), flip, chance, adjusted in zip(masks, flips, p, false_discoveries(p), strict=True)
    )
