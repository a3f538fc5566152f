"""A target's figures in one order, each beside its limit: what every form of the report shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mka_export.report.terminal import NONE, number


@dataclass(frozen=True)
class Metric:
    """How a metric is called and written.

    Attributes:
        name: in words.
        limit: its key in ``limits``.
        at_most: whether the limit is an upper one.
        neutral: its value where nothing was lost.
        scale: what it is multiplied by.
        unit: written after it.
        digits: significant ones.
    """

    name: str
    limit: str
    at_most: bool
    neutral: float
    scale: float = 1.0
    unit: str = ""
    digits: int = 4


METRICS = {
    "ppl_ratio": Metric("perplexity ratio", "max_ppl_ratio", True, 1.0),
    "mean_kl": Metric("mean KL divergence", "max_mean_kl", True, 0.0, unit=" nats", digits=3),
    "top1": Metric("same top token", "min_top1", False, 1.0, 100.0, " %", 3),
    "mmlu_drop": Metric("MMLU drop", "max_mmlu_drop", True, 0.0, 100.0, " points", 3),
}


@dataclass(frozen=True)
class Figure:
    """A measured figure.

    Attributes:
        kind: ``conversion`` or ``compression``.
        against: what the artifact is compared with.
        key: its name in ``METRICS``.
        interval: ``value``, ``low`` and ``high``, each a number or None.
        limit: None where none is set.
        verdict: None where it does not decide.
    """

    kind: str
    against: str
    key: str
    interval: Mapping[str, float | None]
    limit: float | None
    verdict: str | None

    @property
    def metric(self) -> Metric:
        """How it is called and written."""
        return METRICS[self.key]

    @property
    def text(self) -> str:
        """The figure with its interval, in words."""
        return with_interval(self.interval, self.metric.scale, self.metric.unit, self.metric.digits)

    @property
    def limit_text(self) -> str:
        """The limit in words; empty where none is set."""
        if self.limit is None:
            return ""
        return (
            f"{'at most' if self.metric.at_most else 'at least'} {self.metric.scale * self.limit:g}{self.metric.unit}"
        )

    def to_chart(self) -> dict[str, Any]:
        """Return what ``charts.against_limit`` draws."""
        return {**self.interval, "limit": self.limit, "at_most": self.metric.at_most, "verdict": self.verdict}


def figures(target: Mapping[str, Any]) -> list[Figure]:
    """Return what was measured of a report's target, comparison by comparison."""
    return [figure for kind in target["comparisons"] for figure in _of_comparison(target, kind)]


def _of_comparison(target: Mapping[str, Any], kind: str) -> Iterator[Figure]:
    comparison = target["comparisons"][kind]
    checks = {check["metric"]: check for check in comparison["checks"]}
    found: dict[str, Mapping[str, float | None]] = {
        "ppl_ratio": comparison["ppl_ratio"],
        "mean_kl": {**comparison["kl"], "value": comparison["kl"]["mean"]},
        "top1": comparison["top1"],
    }
    if asked := (target.get("mmlu") or {"comparisons": {}})["comparisons"].get(kind):
        found["mmlu_drop"] = _drop(asked["change"])
    for key, interval in found.items():
        check = checks.get(key)
        limit = check["limit"] if check else None
        three = {end: interval[end] for end in ("value", "low", "high")}
        yield Figure(kind, comparison["against"], key, three, limit, check and check["verdict"])


def _drop(change: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return what was lost where ``change`` is what was gained."""
    ends = {"value": "value", "low": "high", "high": "low"}
    return {end: None if (gained := change[other]) is None else 0.0 - gained for end, other in ends.items()}


def with_interval(figure: Mapping[str, Any], scale: float = 1.0, unit: str = "", digits: int = 4) -> str:
    """Write a figure with its interval, where it has one."""
    value, low, high = (number(figure[key], digits, scale) for key in ("value", "low", "high"))
    if value == NONE:
        return NONE
    return f"{value}{unit}" if NONE in (low, high) else f"{value}{unit} ({low} to {high})"


def reasons(target: Mapping[str, Any]) -> list[str]:
    """Return why a target did not pass, in sentences; none where it did.

    A smoke check that is inconclusive does not decide.
    """
    error = target.get("error") or ""
    checks = [check for comparison in target["comparisons"].values() for check in comparison["checks"]]
    checks += [check for check in (target.get("smoke") or {"checks": []})["checks"] if check["verdict"] == "fail"]
    order = ("fail", "inconclusive")
    ranked = sorted((c for c in checks if c["verdict"] in order), key=lambda check: order.index(check["verdict"]))
    return ([error] if error else []) + [check["reason"] for check in ranked if check["reason"] not in error]


def questions_source(source: str) -> str:
    """Say where MMLU's questions are from."""
    return "cais/mmlu on the Hugging Face hub" if source == "hub" else source


def paper_ratio(report: Mapping[str, Any], target: Mapping[str, Any]) -> float | None:
    """Return the compression ratio as the MKA paper counts it; None where the bits a weight are not known.

    One less the share of the layers that is left (14 of 32 removed are 43.75 %: arXiv 2406.16330, abstract), times the
    bits a weight over the original's. Tensors outside the layers are not counted.
    """
    artifact, model, merge = target["artifact"], report["model"], report["merge"]
    bits = artifact and artifact["details"].get("bits_per_weight")
    if not bits or not model["parameters"]:
        return None
    left = merge["layers_after"] / merge["layers_before"] if merge else 1.0
    return float(1 - left * bits / (8 * model["nbytes"] / model["parameters"]))
