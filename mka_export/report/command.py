"""The command that asks for what a report holds, told from its settings."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

EMBEDDED = "embedded"
QUANTIZED = "quantized"  # the step that --attribute adds


def command(report: Mapping[str, Any]) -> str:
    """Return the command line that asks for a report's work again; of several artifacts that were checked, one for each.

    It says what the report says: which model, merge, texts, questions and targets, under which limits. Devices, and the
    files that paths name, must be there as they were.
    """
    targets = report["targets"]
    made = {stage["name"] for stage in report["stages"]} & {target["name"] for target in targets}
    if report["merge"] or made or not targets or any(target["artifact"] is None for target in targets):
        return shlex.join(["mka-export", *_making(report), *_conditions(report, targets)])
    checks = (["mka-export", *_checking(report, target), *_conditions(report, [target])] for target in targets)
    return " && ".join(map(shlex.join, checks))


def _making(report: Mapping[str, Any]) -> Iterator[str]:
    model, merge = report["model"]["name"], report["merge"]
    if merge:
        yield from (model, *_merging(merge), *_healing(report["heal"]))
    else:
        yield from ("convert", model)
    for target in report["targets"]:
        yield from ("--to", target["name"])


def _checking(report: Mapping[str, Any], target: Mapping[str, Any]) -> Iterator[str]:
    yield from ("check", target["artifact"]["path"], "--against", report["model"]["name"])


def _conditions(report: Mapping[str, Any], targets: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if revision := report["model"]["source"].get("revision"):
        yield from ("--revision", revision)
    yield from _evaluation(report["evaluation"])
    if mmlu := report.get("mmlu"):
        yield from ("--mmlu", mmlu["source"], "--mmlu-questions", str(mmlu["questions"]))
        yield from ("--mmlu-shots", str(mmlu["shots"]), "--mmlu-seed", str(mmlu["seed"]))
    if any(step["name"] == QUANTIZED for target in targets for step in target["steps"]):
        yield "--attribute"
    yield from _limits(targets)


def _merging(merge: Mapping[str, Any]) -> Iterator[str]:
    yield from _choosing(merge) if merge["plan"] is None else ("--plan", merge["plan"])
    calibration = merge["calibration"]
    if calibration["source"] != EMBEDDED:
        yield from ("--calibration", calibration["source"])
    yield from ("--calibration-tokens", str(calibration["tokens"]))


def _choosing(merge: Mapping[str, Any]) -> Iterator[str]:
    share = 1 - merge["layers_after"] / merge["layers_before"]
    yield from ("--ratio", f"{share:.4g}", "--method", merge["method"], "--measure", merge["measure"])
    for key in ("schedule", "protect"):
        if merge.get(key) is not None:
            yield from (f"--{key}", str(merge[key]))
    similar = [step for step in merge["steps"] if step["similarity"] is not None]
    if len({step["alpha"] for step in similar}) == 1 and any(step["alpha"] != step["similarity"] for step in similar):
        yield from ("--alpha", str(similar[0]["alpha"]))


def _healing(heal: Mapping[str, Any] | None) -> Iterator[str]:
    if heal:
        yield from ("--heal", heal["method"], "--heal-steps", str(heal["steps"]))
        yield from ("--heal-tokens", str(heal["calibration"]["tokens"]))
        for key in ("batch", "rate", "train"):
            if key in heal:
                yield from (f"--heal-{key}", str(heal[key]))


def _evaluation(evaluation: Mapping[str, Any]) -> Iterator[str]:
    if evaluation["text"] != EMBEDDED:
        yield from ("--text", evaluation["text"])
    yield from ("--windows", str(evaluation["windows"]), "--window-tokens", str(evaluation["window_tokens"]))


def _limits(targets: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Name the limits that all targets share: one that differs is a target's own."""
    for kind, prefix in (("conversion", "conversion-"), ("compression", "")):
        applied = [target["comparisons"][kind]["limits"] for target in targets if kind in target["comparisons"]]
        for name, limit in applied[0].items() if applied else ():
            if limit is not None and all(other.get(name) == limit for other in applied):
                yield from (f"--{prefix}{name.replace('_', '-')}", f"{limit:g}")
