"""What was measured on an artifact, as its stage keeps it, and the judgement that follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mka_export.models.checkpoint import read_json
from mka_export.parity.attribution import LN_PPL, MMLU, attribution
from mka_export.parity.comparison import COMPRESSION, CONVERSION, ORIGINAL, Comparison, Run, compare
from mka_export.parity.metrics import Scores
from mka_export.parity.mmlu.figures import Asked, Mmlu, compare_answers
from mka_export.parity.profile import profile
from mka_export.parity.verdict import judge
from mka_export.publish import write_json
from mka_export.report import with_nulls
from mka_export.target import Limits

SCORES, FACTS = "scores.npz", "parity.json"


@dataclass(frozen=True)
class Measured:
    """The contents of a stage ``parity/TARGET``: no limits, and nothing that follows from them.

    Attributes:
        facts: ``runtime``, ``tokenizer``, ``samples`` and ``smoke`` as the report has them; ``oddities``: unusual texts that the
            tokenizers read differently, and what else is to be warned of; ``failures``: why it fails whatever the scores say; ``speed``: ``prompt`` and
            ``generated``, each with its ``tokens`` and ``seconds``, or None; ``steps``: a ``Run`` each; ``converted``:
            the step that it was made from, None if that is not known; ``bytes_per_token``.
        scores: of every step; None where the runtime failed.
    """

    facts: Mapping[str, Any]
    scores: Scores | None

    @classmethod
    def read(cls, folder: Path) -> Measured:
        """Read a published stage."""
        scores = folder / SCORES
        return cls(read_json(folder / FACTS), Scores.load(scores) if scores.is_file() else None)

    def write(self, folder: Path) -> None:
        """Write what ``read`` reads."""
        write_json(folder / FACTS, self.facts)
        if self.scores is not None:
            self.scores.save(folder / SCORES)

    @classmethod
    def join(cls, shards: Sequence[Measured]) -> Measured:
        """Return what one measurement of everything would be.

        Args:
            shards: of one check, the first first.
        """
        facts = [each.facts for each in shards]
        speeds = [each["speed"] for each in facts]
        scores = [each.scores for each in shards if each.scores is not None]
        whole = len(scores) == len(shards)
        told = [each["tokenizer"] for each in facts if each["tokenizer"]]
        joined = {
            **facts[0],
            "tokenizer": next((each for each in told if not each["identical"]), told[0] if told else None),
            "samples": facts[0]["samples"] if whole else [],  # every shard goes on from all prompts
            **{key: list(dict.fromkeys(line for f in facts for line in f[key])) for key in ("oddities", "failures")},
            "speed": _added(speeds) if whole else None,
        }
        return cls(joined, Scores.join(scores) if whole else None)

    def with_step(self, step: Measured) -> Measured:
        """Return it with one step more before the artifact; where that failed, with a warning that says why."""
        if self.scores is None:
            return self
        if step.scores is None:
            return replace(self, facts={**self.facts, "oddities": [*self.facts["oddities"], *step.facts["failures"]]})
        *before, artifact = self.facts["steps"]
        facts = {**self.facts, "steps": [*before, *step.facts["steps"], artifact]}
        return Measured(facts, replace(self.scores, nll={**self.scores.nll, **step.scores.nll}))

    @property
    def comparison(self) -> Comparison | None:
        """The figures; None where the runtime failed."""
        if self.scores is None:
            return None
        runs = [Run(**step) for step in self.facts["steps"]]
        converted, bytes_per_token = self.facts["converted"], self.facts["bytes_per_token"]
        return compare(self.scores, runs, converted=converted, bytes_per_token=bytes_per_token)

    def judged(
        self,
        conversion: Limits,
        compression: Limits,
        warnings: Sequence[str] = (),
        asked: Asked | None = None,
        failures: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Return the fields of the report's target that follow from what was measured and the limits.

        Args:
            conversion, compression: as ``judge`` takes them.
            warnings: what the converter warns of, to come first.
            asked: what was answered, if questions were asked;
            failures: and why none could be.
        """
        comparison = self.comparison
        mmlu = None if asked is None else self._mmlu(asked, conversion, compression)
        verdict = judge(comparison, conversion, compression, [*self.facts["failures"], *failures], mmlu).to_dict()
        return {
            **{key: self.facts[key] for key in ("runtime", "tokenizer", "samples", "smoke")},
            **verdict,
            **self._spread(comparison, asked),
            "mmlu": mmlu and mmlu.to_dict(),
            "speed": self.facts["speed"] and {kind: _speed(**each) for kind, each in self.facts["speed"].items()},
            "warnings": [*warnings, *self.facts["oddities"], *verdict["warnings"]],
        }

    def _mmlu(self, asked: Asked, conversion: Limits, compression: Limits) -> Mmlu:
        """Return what answers say of the artifact."""
        converted = self.facts["converted"]
        references = {CONVERSION: (converted, conversion.max_mmlu_drop)} if converted is not None else {}
        return compare_answers(asked, {**references, COMPRESSION: (ORIGINAL, compression.max_mmlu_drop)})

    def _spread(self, comparison: Comparison | None, asked: Asked | None) -> dict[str, Any]:
        """Return where the loss came from and how it is spread: ``attribution`` and ``profile``."""
        if self.scores is None or comparison is None:
            return {"attribution": [], "profile": None}
        nll = {step.name: self.scores.nll[step.name] for step in comparison.steps}
        causes = [attribution(LN_PPL, nll), *([attribution(MMLU, asked.right)] if asked else [])]
        found: dict[str, Any] = with_nulls({"attribution": causes, "profile": profile(self.scores, comparison)})
        return found


def _added(speeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        kind: {key: sum(speed[kind][key] for speed in speeds) for key in ("tokens", "seconds")}
        for kind in ("prompt", "generated")
    }


def _speed(tokens: int, seconds: float) -> float | None:
    """Return tokens a second."""
    return tokens / seconds if tokens and seconds else None


def unmeasured(runtime: str, failure: str) -> Measured:
    """Return what is said of an artifact that could not be made."""
    return Measured({**empty_facts(runtime, {}), "failures": [failure]}, None)


def empty_facts(runtime: str, versions: Mapping[str, str]) -> dict[str, Any]:
    """Return the facts of an artifact that was not run: ``runtime`` is the name of the one that it ships with."""
    return {
        "runtime": {"name": runtime, "device": "", "versions": dict(versions)},
        "tokenizer": None,
        "samples": [],
        "smoke": None,
        "oddities": [],
        "failures": [],
        "speed": None,
        "steps": [],
        "converted": None,
        "bytes_per_token": None,
    }
