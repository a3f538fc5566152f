"""What a model is given for a question, and the four tokens that its answer is read from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from mka_export.errors import UnsupportedError, UsageError
from mka_export.parity.mmlu.questions import LETTERS, Question, Subject
from mka_export.parity.runtimes import Prefixed

Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True)
class Prompt:
    """A question as it is asked.

    Attributes:
        subject: its subject's name.
        text: all that comes before the answer.
        ids: the same as tokens, with BOS where the tokenizer puts one.
        answer: 0 to 3, the right one.
    """

    subject: str
    text: str
    ids: tuple[int, ...]
    answer: int


@dataclass(frozen=True)
class Sheet:
    """All questions of a measurement.

    Attributes:
        prompts: subject after subject.
        letters: the ids of `` A``, `` B``, `` C`` and `` D``, as they follow a prompt.
    """

    prompts: tuple[Prompt, ...]
    letters: tuple[int, ...]

    def groups(self) -> list[Prefixed]:
        """Return the prompts, in order, with what those of a subject begin with apart, to be computed once."""
        return [_prefixed([p.ids for p in group]) for _, group in groupby(self.prompts, key=lambda p: p.subject)]


def make_sheet(
    subjects: Iterable[Subject], shots: int, tokenize: Tokenize, leading: Sequence[int], context: int
) -> Sheet:
    """Turn questions into prompts, in the words of Hendrycks et al.

    Examples that would not fit the model's context are left out, the last first, as the authors' program does.

    Args:
        shots: answered examples before each question.
        tokenize: text -> ids, without BOS.
        leading: the ids before every text, if any.
        context: tokens that the model takes.

    Raises:
        UsageError: a subject has fewer examples, or a question alone is too long.
        UnsupportedError: the letters are not four different tokens for this tokenizer.
    """
    letters: tuple[int, ...] | None = None
    prompts: list[Prompt] = []
    for subject in subjects:
        if len(subject.examples) < shots:
            raise UsageError(
                f"--mmlu-shots {shots}: {subject.name} has {len(subject.examples)} examples", "Ask for fewer."
            )
        for question in subject.questions:
            for count in range(shots, -1, -1):
                text = prompt_text(subject, question, count)
                ids = (*leading, *tokenize(text))
                if len(ids) <= context:
                    break
            else:
                raise UsageError(
                    f"a question of {subject.name} has {len(ids)} tokens, and the model takes {context}",
                    "Leave out --mmlu.",
                )
            if letters is None or (ids[-1] != prompts[-1].ids[-1]):  # else what is proved for the last holds here
                found = letter_ids(tokenize, text)
                if letters not in (None, found):
                    raise UnsupportedError(_no_letters(text), "Leave out --mmlu.")
                letters = found
            prompts.append(Prompt(subject.name, text, ids, question.answer))
    if letters is None:
        raise UsageError("there are no questions", "Ask for more.")
    return Sheet(tuple(prompts), letters)


def prompt_text(subject: Subject, question: Question, shots: int) -> str:
    """Return a question after so many answered examples of its subject (arXiv 2009.03300, appendix A)."""
    head = f"The following are multiple choice questions (with answers) about {subject.name.replace('_', ' ')}.\n\n"
    examples = (f"{_asked(each)} {LETTERS[each.answer]}\n\n" for each in subject.examples[:shots])
    return head + "".join(examples) + _asked(question)


def letter_ids(tokenize: Tokenize, text: str) -> tuple[int, ...]:
    """Return the tokens that `` A``, `` B``, `` C`` and `` D`` are after ``text``.

    Raises:
        UnsupportedError: one is not a single token of its own, or changes the tokens before it.
    """
    before, found = tokenize(text), []
    for letter in LETTERS:
        after = tokenize(f"{text} {letter}")
        if after[:-1] != before:
            raise UnsupportedError(_no_letters(text), "Leave out --mmlu.")
        found.append(after[-1])
    if len(set(found)) < len(LETTERS):
        raise UnsupportedError(_no_letters(text), "Leave out --mmlu.")
    return tuple(found)


def _no_letters(text: str) -> str:
    return f"MMLU: for this tokenizer the letters A to D are not one token each after {text[-20:]!r}"


def _asked(question: Question) -> str:
    choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=True))
    return f"{question.question.strip()}{choices}\nAnswer:"


def _prefixed(prompts: Sequence[tuple[int, ...]]) -> Prefixed:
    """Take off what all of ``prompts`` begin with; at least one token of each stays."""
    first, last = min(prompts), max(prompts)  # what these two share, all between them do
    longest = min(map(len, prompts)) - 1
    shared = next((i for i in range(longest) if first[i] != last[i]), longest)
    return Prefixed(first[:shared], tuple(ids[shared:] for ids in prompts))
