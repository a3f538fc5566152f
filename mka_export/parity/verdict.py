"""Is the artifact good enough? Pass, fail or inconclusive, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from mka_export.parity.comparison import COMPRESSION, CONVERSION, Comparison, Difference
from mka_export.parity.metrics import ARTIFACT
from mka_export.parity.mmlu.figures import Change, Mmlu
from mka_export.parity.statistics import MIN_WINDOWS, Interval, cases_to_decide
from mka_export.target import Limits

Outcome = Literal["pass", "fail", "inconclusive"]
EXIT_CODES: Mapping[Outcome, int] = {"pass": 0, "fail": 3, "inconclusive": 4}
ONE_LETTER = 0.6  # a share of the answers, from which on a model is said to know one letter
EXPLODED = 2.0  # a perplexity ratio above which the loss shows in any text


@dataclass(frozen=True)
class Check:
    """One limit and what came of it.

    Attributes:
        metric: ``ppl_ratio``, ``mean_kl``, ``top1`` or ``mmlu_drop``.
        value: the figure.
        low: lower end of its 95 % interval.
        high: upper end.
        limit: the limit.
        verdict: ``pass`` if the whole interval keeps the limit, ``fail`` if none of it does, else ``inconclusive``.
        reason: the same in a sentence.
    """

    metric: str
    value: float
    low: float
    high: float
    limit: float
    verdict: Outcome
    reason: str


@dataclass(frozen=True)
class Verdict:
    """The judgement of one artifact.

    Attributes:
        outcome: the worst of its parts.
        comparison: the figures; None if the artifact could not be run.
        limits: ``conversion`` and ``compression`` -> the limits applied.
        checks: ``conversion`` and ``compression`` -> a check for each limit that decides.
        failures: hard failures, which no figure can outweigh.
        warnings: what a reader must know that does not decide.
    """

    outcome: Outcome
    comparison: Comparison | None
    limits: Mapping[str, Limits]
    checks: Mapping[str, tuple[Check, ...]]
    failures: tuple[str, ...] = ()
    warnings: tuple[str, ...] = field(default=())

    @property
    def exit_code(self) -> int:
        """The exit code of a command that ends with this verdict."""
        return EXIT_CODES[self.outcome]

    @property
    def reasons(self) -> list[str]:
        """The sentences behind the outcome: hard failures first, then what failed, is unsure, passed."""
        checks = sorted((c for group in self.checks.values() for c in group), key=lambda c: -_RANK[c.verdict])
        return [*self.failures, *(c.reason for c in checks)] or ["No limit was set, so nothing was judged."]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields ``verdict``, ``error``, ``steps``, ``comparisons`` and ``warnings`` of a report's target."""
        comparison = self.comparison
        steps = comparison.steps if comparison else ()
        fields = ("name", "runtime", "device", "perplexity", "perplexity_se", "bits_per_byte")
        return {
            "verdict": self.outcome,
            "error": "; ".join(self.failures) or None,
            "steps": [_finite({name: getattr(step, name) for name in fields}) for step in steps],
            "comparisons": {
                kind: self._entry(kind, d) for kind, d in (comparison.differences if comparison else {}).items()
            },
            "warnings": list(self.warnings),
        }

    def _entry(self, kind: str, difference: Difference) -> dict[str, Any]:
        checks = self.checks[kind]
        kl = difference.mean_kl
        return {
            "against": difference.against,
            "tokens": difference.tokens,
            "ppl_ratio": _finite(asdict(difference.ppl_ratio)),
            **_finite({"ppl_ratio_seen": difference.ppl_ratio_seen}),
            "kl": _finite(
                {
                    "mean": kl.value,
                    "low": kl.low,
                    "high": kl.high,
                    "median": difference.median_kl,
                    "p99": difference.p99_kl,
                }
            ),
            "top1": _finite(asdict(difference.top1)),
            "limits": {name: limit for name, limit in asdict(self.limits[kind]).items() if limit is not None},
            "checks": [_finite(asdict(check)) for check in checks],
            "verdict": worst(["fail" if _broken(difference) else "pass", *(check.verdict for check in checks)]),
        }


def judge(
    comparison: Comparison | None,
    conversion: Limits,
    compression: Limits,
    failures: Sequence[str] = (),
    mmlu: Mmlu | None = None,
) -> Verdict:
    """Judge what was measured.

    Args:
        comparison: the figures; None if the artifact could not be run (``failures`` then says why).
        conversion: limits against the checkpoint it was made from.
        compression: limits against the original model.
        failures: hard failures found elsewhere, as sentences: other token ids, a runtime that failed.
        mmlu: what came of the questions, if any were asked.
    """
    limits = {CONVERSION: conversion, COMPRESSION: compression}
    hard, warnings = list(failures), []
    checks: dict[str, tuple[Check, ...]] = {}
    for kind, difference in comparison.differences.items() if comparison else ():
        assert comparison is not None
        hard += [f"{kind.capitalize()}: {what}." for what in _broken(difference)]
        blind = _at_chance(comparison, difference)
        found = _checks(kind, difference, limits[kind], skip_ratio=blind)
        checks[kind] = tuple(_with_advice(check, _windows_for(check, comparison.windows), "windows") for check in found)
        if mmlu is not None and kind in mmlu.comparisons:
            checks[kind] += tuple(_mmlu_check(kind, mmlu.comparisons[kind]))
        warnings += _warnings(comparison, difference, blind)
    warnings += _mmlu_warnings(mmlu) if mmlu else []
    outcome = worst(["fail" if hard else "pass", *(check.verdict for group in checks.values() for check in group)])
    return Verdict(outcome, comparison, limits, checks, tuple(hard), tuple(dict.fromkeys(warnings)))


def worst(outcomes: Iterable[Outcome]) -> Outcome:
    """Return the worst of ``outcomes``; ``pass`` if there are none."""
    return max(outcomes, key=_RANK.__getitem__, default="pass")


_RANK: Mapping[Outcome, int] = {"pass": 0, "inconclusive": 1, "fail": 2}
_GOOD = {"pass": "keeps", "fail": "breaks", "inconclusive": "may or may not keep"}


def _checks(kind: str, difference: Difference, limits: Limits, *, skip_ratio: bool) -> Iterable[Check]:
    against = f"{kind.capitalize()}: {{}} against the {difference.against} model"
    if limits.max_ppl_ratio is not None and not skip_ratio:
        yield _check("ppl_ratio", against.format("perplexity ratio"), difference.ppl_ratio, limits.max_ppl_ratio, 1)
    if limits.max_mean_kl is not None:
        yield _check("mean_kl", against.format("mean KL divergence"), difference.mean_kl, limits.max_mean_kl, 1)
    if limits.min_top1 is not None:
        yield _check("top1", against.format("top-1 agreement"), difference.top1, limits.min_top1, -1)


def _with_advice(check: Check, wanted: int | None, what: str) -> Check:
    """Return a check, where it is left open, with how many windows or questions would close it."""
    if check.verdict != "inconclusive" or not wanted:
        return check
    return replace(check, reason=f"{check.reason} About {wanted:,} {what} would tell.")


def _windows_for(check: Check, windows: int) -> int | None:
    return cases_to_decide(Interval(check.value, check.low, check.high), check.limit, windows)


def _mmlu_check(kind: str, change: Change) -> Iterable[Check]:
    if change.margin is not None and change.informative:
        name = f"{kind.capitalize()}: the drop on MMLU from the {change.against} model"
        check = _check("mmlu_drop", name, change.drop, change.margin, 1)
        yield _with_advice(check, change.questions_for_margin, "questions")


def _mmlu_warnings(mmlu: Mmlu) -> list[str]:
    blind = [change for change in mmlu.comparisons.values() if not change.informative]
    warnings = [
        f"The {change.against} model answers MMLU no better than chance ({100 * step.accuracy.value:.1f} % of "
        f"{change.questions} questions), so what is lost on it tells nothing and does not decide."
        for change in blind
        for step in mmlu.steps
        if step.name == change.against
    ]
    for step in mmlu.steps:
        letter, count = max(step.letters.items(), key=lambda item: item[1])
        if (said := count / sum(step.letters.values())) > ONE_LETTER:
            warnings.append(f"The {step.name} model answers {letter} to {100 * said:.0f} % of MMLU's questions.")
    return warnings


def _check(metric: str, name: str, interval: Interval, limit: float, sign: int) -> Check:
    """Check ``interval`` against an upper limit (``sign`` 1) or a lower one (-1)."""
    low, high = sorted((sign * interval.low, sign * interval.high))
    outcome: Outcome
    if not math.isfinite(interval.value):
        outcome = "fail"
    elif high <= sign * limit:
        outcome = "pass"
    else:
        outcome = "fail" if low > sign * limit else "inconclusive"
    bound = "at most" if sign > 0 else "at least"
    spread = f"95 % interval {interval.low:.4g} to {interval.high:.4g}" if math.isfinite(low) else "no interval"
    reason = f"{name} is {interval.value:.4g} ({spread}): it {_GOOD[outcome]} the limit of {bound} {limit:.4g}."
    return Check(metric, interval.value, interval.low, interval.high, limit, outcome, reason)


def _broken(difference: Difference) -> list[str]:
    """Name the figures that are NaN or infinite: such an artifact (or reference) does not work."""
    figures = {
        "the perplexity ratio": difference.ln_ppl_ratio.value,
        "the mean KL divergence": difference.mean_kl.value,
    }
    return [
        f"{name} against the {difference.against} model is not a finite number"
        for name, value in figures.items()
        if not math.isfinite(value)
    ]


def _at_chance(comparison: Comparison, difference: Difference) -> bool:
    """Tell whether the reference guesses no better than evenly among all tokens, so that its ratio tells nothing."""
    reference = comparison.step(difference.against)
    return reference.nll >= math.log(reference.vocab_size)


def _warnings(comparison: Comparison, difference: Difference, blind: bool) -> list[str]:
    reference, artifact = comparison.step(difference.against), comparison.step(ARTIFACT)
    warnings = []
    if comparison.windows < MIN_WINDOWS:
        warnings.append(
            f"{comparison.windows} windows are too few for an interval, which takes {MIN_WINDOWS}: no limit can be judged."
        )
    if blind:
        warnings.append(
            f"The {reference.name} model itself guesses no better than chance (perplexity {reference.perplexity:.4g} "
            f"of {reference.vocab_size} tokens), so the perplexity ratio tells nothing and does not decide."
        )
    elif difference.ppl_ratio.value > EXPLODED:
        warnings.append(
            f"The perplexity exploded: the artifact's is {difference.ppl_ratio.value:.3g} times that of the "
            f"{reference.name} model ({artifact.perplexity:.4g} against {reference.perplexity:.4g}). Expect text that is "
            "visibly worse, whatever the other figures say."
        )
    if reference.vocab_size != artifact.vocab_size:
        warnings.append(
            f"The artifact has {artifact.vocab_size} tokens, the {reference.name} model {reference.vocab_size}: "
            "they are compared on those that both have."
        )
    return warnings


def _finite(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``fields`` with None for every number that JSON has no spelling for."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
