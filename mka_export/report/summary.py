"""``summary.md``: a report in Markdown, for the page of a CI job."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mka_export.needs import size
from mka_export.report.command import command
from mka_export.report.figures import METRICS, figures, reasons, with_interval
from mka_export.report.markdown import code, details, escape, table
from mka_export.report.terminal import model_line, number, text_source

SIGNS = {"pass": "✅ pass", "fail": "❌ fail", "inconclusive": "❔ inconclusive"}


def summary_markdown(report: Mapping[str, Any]) -> str:
    """Return a report in Markdown: a table of verdicts, then what each rests on, folded."""
    lines = [f"## mka-export: {escape(report['model']['name'])}", "", *_verdicts(report), ""]
    for target in report["targets"]:
        lines += [f"- {escape(target['name'])}: {escape(reason)}" for reason in reasons(target)]
    lines.append("")
    warnings = [(target["name"], warning) for target in report["targets"] for warning in target["warnings"]]
    warnings += [("report", warning) for warning in report["warnings"]]
    lines += [f"> ⚠️ {escape(name)}: {escape(warning)}  " for name, warning in warnings]
    lines.append("")
    for target in report["targets"]:
        lines += details(f"{escape(target['name'])}: figures", figure_lines(target))
        if target["samples"]:
            lines += details(f"{escape(target['name'])}: sample prompts", _samples(target))
    lines += details("How it was made and measured", _how(report))
    return "\n".join(lines).replace("\n\n\n", "\n\n").rstrip() + "\n"


def _verdicts(report: Mapping[str, Any]) -> list[str]:
    columns = ["verdict", "target", "size", "perplexity ratio", "mean KL", "same top token", "MMLU drop"]
    rows = []
    for target in report["targets"]:
        found = {figure.key: figure for figure in figures(target) if figure.kind == "compression"}
        artifact = target["artifact"]
        share = artifact and artifact["share_of_original"]
        large = size(artifact["nbytes"]) if artifact else "–"
        large += f" ({100 * share:.0f} % of the original)" if share is not None else ""
        cells = [found[key].text if key in found else "–" for key in METRICS]
        rows.append([SIGNS[target["verdict"]], escape(target["name"]), large, *cells])
    used = [i for i in range(len(columns)) if i < 3 or any(row[i] != "–" for row in rows)]
    return table([columns[i] for i in used], [[row[i] for i in used] for row in rows])


def figure_lines(target: Mapping[str, Any]) -> list[str]:
    """Return a target's figures as Markdown: against each limit, step by step, and of MMLU."""
    lines: list[str] = []
    if found := figures(target):
        rows = [
            [
                f"{f.kind} against {f.against}",
                f.metric.name,
                f.text,
                f.limit_text or "–",
                SIGNS.get(f.verdict or "", "–"),
            ]
            for f in found
        ]
        lines += [*table(["comparison", "figure", "95 % interval", "limit", "verdict"], rows), ""]
    if target["steps"]:
        rows = [
            [
                s["name"],
                number(s["perplexity"]),
                number(s["bits_per_byte"]),
                f"{escape(s['runtime'])}, {escape(s['device'])}",
            ]
            for s in target["steps"]
        ]
        lines += [*table(["step", "perplexity", "bits a byte", "measured in"], rows), ""]
    for comparison in target["comparisons"].values():
        kl = comparison["kl"]
        median, most = number(kl["median"], 3), number(kl["p99"], 3)
        lines += [
            f"KL divergence from the {escape(comparison['against'])} model: median {median}, 99th percentile {most}.",
            "",
        ]
    if mmlu := target.get("mmlu"):
        rows = [
            [
                s["name"],
                with_interval(s["accuracy"], 100, " %", 3),
                "no better than guessing" if s["at_chance"] else "–",
            ]
            for s in mmlu["steps"]
        ]
        lines += [*table(["MMLU", "right answers", "note"], rows), ""]
    return lines[:-1]


def _samples(target: Mapping[str, Any]) -> list[str]:
    rows = [[escape(sample[side]) for side in ("prompt", "original", "artifact")] for sample in target["samples"]]
    return table(["prompt", "original goes on", "artifact goes on"], rows)


def _how(report: Mapping[str, Any]) -> Iterator[str]:
    merge, evaluation, mmlu = report["merge"], report["evaluation"], report.get("mmlu")
    yield f"- {escape(model_line(report['model']))}"
    if merge:
        calibration = merge["calibration"]
        yield (
            f"- Merged {merge['layers_before']} → {merge['layers_after']} layers by {escape(merge['method'])} (measure "
            f"{escape(merge['measure'])}), calibrated on {calibration['tokens']:,} tokens of "
            f"{escape(text_source(calibration['source']))}"
        )
    yield (
        f"- Measured on {evaluation['windows']} windows of {evaluation['window_tokens']} tokens of "
        f"{escape(text_source(evaluation['text']))}"
    )
    if mmlu:
        yield f"- MMLU: {mmlu['questions']:,} questions of {mmlu['subjects']} subjects, {mmlu['shots']}-shot, seed {mmlu['seed']}"
    yield f"- {', '.join(f'{escape(name)} {escape(version)}' for name, version in report['tool'].items())}"
    if not report.get("shard"):
        yield f"- {code(command(report))}"
    for target in report["targets"]:
        for file in (target["artifact"] or {"files": []})["files"]:
            yield f"- {code(file['path'])} sha256 {code(file['sha256'])}"
