"""The report on a terminal: the verdict first, then the figures behind it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from mka_export.needs import size

STYLES = {"pass": "bold white on green", "fail": "bold white on red", "inconclusive": "bold black on yellow"}
COLOURS = {"pass": "green", "fail": "red", "inconclusive": "yellow"}
NONE = "–"
SAMPLES = 4  # that are shown; the report has all


def print_json(found: object) -> None:
    """Print on stdout what a command found, for a machine to read."""
    print(json.dumps(found, indent=2, ensure_ascii=False))


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Print ``report`` (the layout is in ``report.schema.json``) for a person to read."""
    for target in report["targets"]:
        _print_verdict(target, console)
    console.print()
    for line in _about_the_model(report):
        console.print(Text(line))
    for target in report["targets"]:
        _print_target(target, console)
    _print_warnings(report["warnings"], console)
    console.print(Text(_about_the_run(report), style="dim"))


def print_loss(found: Mapping[str, Any], console: Console, *, quiet: bool) -> None:
    """Print what a checkpoint lost to merging, from the fields of its verdict; only the warnings if ``quiet``."""
    if not quiet:
        first, last = found["steps"]
        line = Text(f"perplexity {number(first['perplexity'])} → {number(last['perplexity'])}, to the original's: ")
        console.print(line + interval(found["comparisons"]["compression"]["ppl_ratio"]) + f", in {last['runtime']}")
    if error := found["error"]:
        console.print(Text(f"Warning: {error}", style="bold red"))
    _print_warnings(found["warnings"], console)


def _print_verdict(target: Mapping[str, Any], console: Console) -> None:
    verdict = target["verdict"]
    line = Text.assemble((f" {verdict.upper()} ", STYLES[verdict]), "  ", (target["name"], "bold"))
    if target["artifact"]:
        line.append(f"  {target['artifact']['path']}")
    console.print(line, soft_wrap=True)
    if target.get("error"):
        console.print(Text(f"  {target['error']}", style=COLOURS["fail"]))
    for kind, comparison in target["comparisons"].items():
        for check in comparison["checks"]:
            if check["verdict"] != "pass":
                reason = check["reason"]
                named = reason if reason.lower().startswith(kind) else f"{kind}: {reason}"
                console.print(Text(f"  {named}", style=COLOURS[check["verdict"]]))
    _print_warnings(target["warnings"], console)


def _about_the_model(report: Mapping[str, Any]) -> Iterator[str]:
    model, merge, evaluation = report["model"], report["merge"], report["evaluation"]
    yield model_line(model)
    if merge:
        calibration = merge["calibration"]
        yield (
            f"Merge     {merge['layers_before']} → {merge['layers_after']} layers by {merge['method']}, measure "
            f"{merge['measure']}, calibrated on {calibration['tokens']:,} tokens of {text_source(calibration['source'])}"
        )
        if spans := merge.get("layers"):
            yield f"Layers    {spans_text(spans)}"
        if depth := merge["depth"]:
            left = merge["layers_after"]
            yield f"Depth     {left} layers are the limit of {depth['limit']}: {depth['limited_by']}"
    if heal := report["heal"]:
        looks = {look["step"]: look["kl"] for look in heal["held_out"]}
        yield (
            f"Healed    by distillation, {len(heal['losses'])} steps on {heal['calibration']['tokens']:,} tokens: KL on "
            f"held-out text {number(looks[0])} → {number(looks[heal['best']])} (step {heal['best']})"
        )
    if shard := report["shard"]:
        yield f"Shard     {shard['index']} of {shard['count']}: each of them measures its part of these windows"
    yield (
        f"Measured  on {evaluation['windows']} windows of {evaluation['window_tokens']} tokens of "
        f"{text_source(evaluation['text'])} ({evaluation['tokens']:,} predictions)"
    )


def model_line(model: Mapping[str, Any]) -> str:
    """Say what a model is, and where it is from."""
    source = model["source"]
    pinned = f" at {source['revision'][:12]}" if source.get("revision") else ""
    return (
        f"Model     {model['name']} ({source['kind']} {source['id']}{pinned}): "
        f"{model['layers']} layers, {model['parameters'] / 1e6:,.0f} M parameters, {size(model['nbytes'])}"
    )


def _print_target(target: Mapping[str, Any], console: Console) -> None:
    console.print()
    console.rule(Text(target["name"], style="bold"), align="left", characters="─")
    runtime = target["runtime"]
    if target["artifact"]:
        for line in _about_the_artifact(target["artifact"]):
            console.print(Text(line))
    if budget := target["budget"]:
        console.print(
            Text(
                f"Memory    {size(budget['taken'])} of {size(budget['memory'])}, with {budget['context']:,} tokens of context"
            )
        )
    versions = ", ".join(f"{name} {version}" for name, version in runtime["versions"].items())
    where = f" on {runtime['device']}" if runtime["device"] else ""
    console.print(Text(f"Runtime   {runtime['name']}{where}" + (f" ({versions})" if versions else "")))
    tokenizer = target["tokenizer"]
    if tokenizer and tokenizer["identical"]:
        console.print(Text(f"Tokens    the same ids as the original's on {tokenizer['texts']} texts"))
    elif tokenizer:
        console.print(Text(f"Tokens    DIFFERENT: {tokenizer['first_difference']}", style=COLOURS["fail"]))
    if target["smoke"]:
        console.print(_smoke(target["smoke"]))
    if target["steps"]:
        console.print(_steps(target["steps"]))
    if target["comparisons"]:
        console.print(_comparisons(target["comparisons"]))
    if target["mmlu"]:
        console.print(_mmlu(target["mmlu"], target["comparisons"]))
    if target["samples"]:
        console.print(_samples(target["samples"]))


def _about_the_artifact(artifact: Mapping[str, Any]) -> Iterator[str]:
    details = artifact["details"]
    share = artifact["share_of_original"]
    bits, whole = details.get("bits_per_weight"), details.get("bits_per_weight_of_original")
    yield (
        f"Size      {size(artifact['nbytes'])}"
        + (f", {100 * share:.1f} % of the original" if share is not None else "")
        + (f", {bits:.2f} bits a weight" if bits is not None else "")
        + (f" ({whole:.2f} if no layers were merged)" if whole not in (None, bits) else "")
    )
    if graph := details.get("graph"):
        level = details.get("accuracy_level")
        rounding = f", accuracy level {level}" if level is not None else ""
        yield f"Graph     {graph}, of operators for {details['provider']}{rounding}"
    if types := details.get("types"):
        yield f"Tensors   {_counts(types)}"
    if fallbacks := details.get("fallback_types"):
        share = details.get("fallback_share")
        of_weights = f", {100 * share:.1f} % of the weights" if share is not None else ""
        yield f"Fallback  {_counts(fallbacks)}{of_weights}: their rows do not fit the type's blocks"


def _smoke(smoke: Mapping[str, Any]) -> Text:
    checks = [(f"{c['name'].replace('_', ' ')}: ", (c["verdict"], COLOURS[c["verdict"]])) for c in smoke["checks"]]
    before, after = (number(smoke["repetition"][side], 2) for side in ("original", "artifact"))
    line = Text("; ").join(Text.assemble(*parts) for parts in checks)
    return Text("Behaves   ") + line + f" (repeats itself {before} → {after})"


def _steps(steps: list[Mapping[str, Any]]) -> Table:
    table = _table("Step by step", "perplexity", "bits a byte", "measured in")
    for step in steps:
        perplexity = number(step["perplexity"])
        if step["perplexity_se"] is not None:
            perplexity += f" ± {number(step['perplexity_se'], 2)}"
        table.add_row(step["name"], perplexity, number(step["bits_per_byte"]), f"{step['runtime']}, {step['device']}")
    return table


def _comparisons(comparisons: Mapping[str, Mapping[str, Any]]) -> Table:
    table = _table("95 % intervals", *(f"{kind} against {c['against']}" for kind, c in comparisons.items()))
    kinds = list(comparisons.values())
    table.add_row("perplexity ratio", *(interval(c["ppl_ratio"]) + _judged(c, "ppl_ratio", "≤") for c in kinds))
    table.add_row("smallest ratio seen", *(Text(number(c["ppl_ratio_seen"])) for c in kinds))
    table.add_row(
        "mean KL, nats",
        *(interval({**c["kl"], "value": c["kl"]["mean"]}) + _judged(c, "mean_kl", "≤") for c in kinds),
    )
    table.add_row("median, p99 KL", *(Text(f"{number(c['kl']['median'])}, {number(c['kl']['p99'])}") for c in kinds))
    table.add_row("same top token", *(interval(c["top1"], 100, " %") + _judged(c, "top1", "≥", 100) for c in kinds))
    table.add_row("verdict", *(Text(c["verdict"], style=COLOURS[c["verdict"]]) for c in kinds))
    return table


def _mmlu(mmlu: Mapping[str, Any], comparisons: Mapping[str, Mapping[str, Any]]) -> Group:
    """Return what came of the questions: accuracy step by step, and what was gained and lost."""
    steps = _table("MMLU", "right, 95 % interval", "answers A, B, C, D", "asked in")
    for step in mmlu["steps"]:
        right = interval(step["accuracy"], 100, " %") + (" like guessing" if step["at_chance"] else "")
        steps.add_row(
            step["name"], right, ", ".join(map(str, step["letters"].values())), f"{step['runtime']}, {step['device']}"
        )
    kinds = mmlu["comparisons"]
    table = _table("MMLU, paired", *(f"{kind} against {c['against']}" for kind, c in kinds.items()))
    changes = kinds.values()
    table.add_row(
        "change of accuracy",
        *(
            interval(c["change"], 100, " %") + _judged(comparisons[kind], "mmlu_drop", "drop ≤", 100)
            for kind, c in kinds.items()
        ),
    )
    table.add_row("questions lost, gained", *(f"{c['lost']}, {c['gained']} of {c['questions']}" for c in changes))
    table.add_row("McNemar's test, p", *(number(c["p"], 2) for c in changes))
    table.add_row("same answer", *(f"{number(c['same_answer'], 4, 100)} %" for c in changes))
    table.add_row("smallest change seen", *(f"{number(c['smallest_seen'], 2, 100)} %" for c in changes))
    if any(c["questions_for_margin"] for c in changes):
        table.add_row("questions for the limit", *(str(c["questions_for_margin"] or NONE) for c in changes))
    return Group(steps, table)


def _samples(samples: list[Mapping[str, str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
    for heading in ("prompt", "original goes on", "artifact goes on"):
        table.add_column(heading, ratio=1, overflow="fold")
    for sample in samples[:SAMPLES]:
        table.add_row(*(Text(" ".join(sample[side].split())) for side in ("prompt", "original", "artifact")))
    return table


def _print_warnings(warnings: list[str], console: Console) -> None:
    for warning in warnings:
        console.print(Text(f"Warning: {warning}", style="bold yellow"))


def _about_the_run(report: Mapping[str, Any]) -> str:
    stages = ", ".join(
        f"{s['name']} {'kept' if s['reused'] else NONE if s['seconds'] is None else format(s['seconds'], '.0f') + ' s'}"
        for s in report["stages"]
    )
    peak = report["peak_memory_bytes"]
    return "; ".join(part for part in (stages, f"peak memory {size(peak)}" if peak is not None else "") if part)


def _table(title: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(title, no_wrap=True)
    for column in columns:
        table.add_column(column)
    return table


def _judged(comparison: Mapping[str, Any], metric: str, sign: str, scale: float = 1) -> Text:
    """Return the limit on ``metric`` in the colour of its verdict; nothing where there is none."""
    for check in comparison["checks"]:
        if check["metric"] == metric:
            return Text(f"  {sign} {scale * check['limit']:g}: {check['verdict']}", COLOURS[check["verdict"]])
    return Text()


def interval(figure: Mapping[str, Any], scale: float = 1, unit: str = "") -> Text:
    """Write a figure with its interval, where it has one."""
    value, low, high = (number(figure[key], 4, scale) for key in ("value", "low", "high"))
    return Text(f"{value}{unit}" if NONE in (low, high) else f"{value}{unit} ({low} to {high})")


def number(value: float | None, digits: int = 4, scale: float = 1) -> str:
    """Format with ``digits`` significant digits, without an exponent between 0.0001 and a million."""
    if value is None or not math.isfinite(value):
        return NONE
    size = abs(value * scale)
    text = f"{size:,.0f}" if 10**digits <= size < 1e6 else f"{size:#.{digits}g}".rstrip(".")
    return f"−{text}" if value * scale < 0 else text


def text_source(source: str) -> str:
    """Say where a text is from."""
    return "the embedded text" if source == "embedded" else source


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))


def spans_text(spans: list[list[int]]) -> str:
    """Write spans of layers shortly: untouched runs as ``0 … 17``, merged layers as ``18+19``."""
    parts: list[str] = []
    for merged, group in groupby(enumerate(spans), key=lambda at: (at[1][0] < at[1][1], at[1][0] - at[0])):
        members = [span for _, span in group]
        if merged[0]:
            parts += ["+".join(map(str, range(first, last + 1))) for first, last in members]
        else:
            first, last = members[0][0], members[-1][0]
            parts.append(str(first) if first == last else f"{first} … {last}")
    return ", ".join(parts)
