"""Measure an artifact against what it came from, on the same token windows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mka_export.models.outline import Outline
from mka_export.models.runner import layer_pass_bytes
from mka_export.parity.metrics import ARTIFACT, Scores, Values, score
from mka_export.parity.runtimes import Runtime, Windows
from mka_export.parity.statistics import Interval, bootstrap_means, perplexity, shift_seen
from mka_export.progress import Progress

ORIGINAL, MERGED, HEALED, QUANTIZED = "original", "merged", "healed", "quantized"
CONVERSION, COMPRESSION = "conversion", "compression"


@dataclass(frozen=True)
class Run:
    """Where the scores of one step come from.

    Attributes:
        name: of the step.
        runtime: the runtime it was measured in.
        device: where that computed.
        vocab_size: columns of its distributions.
    """

    name: str
    runtime: str
    device: str
    vocab_size: int

    @classmethod
    def of(cls, name: str, runtime: Runtime) -> Run:
        """Return that of a step in its runtime."""
        return cls(name, runtime.name, runtime.device, runtime.vocab_size)


@dataclass(frozen=True)
class Step:
    """One model on the way from the original to the artifact.

    Attributes:
        name: ``original``, ``merged``, ``healed``, ``quantized`` or ``artifact``.
        runtime: the runtime it was measured in.
        device: where that computed.
        nll: mean negative log-likelihood, nats a token.
        perplexity: exp(nll).
        perplexity_se: its standard error; NaN for a single window.
        bits_per_byte: comparable between tokenizers; None if the text's bytes are not known.
        vocab_size: columns of its distributions.
    """

    name: str
    runtime: str
    device: str
    nll: float
    perplexity: float
    perplexity_se: float
    bits_per_byte: float | None
    vocab_size: int


@dataclass(frozen=True)
class Difference:
    """The artifact against one reference, with 95 % intervals.

    Attributes:
        against: name of the reference's step.
        tokens: predicted tokens.
        ln_ppl_ratio: ln(artifact perplexity / reference perplexity).
        mean_kl: mean KL(reference ‖ artifact), nats a token.
        median_kl, p99_kl: over tokens.
        top1: share of positions where both prefer the same token.
    """

    against: str
    tokens: int
    ln_ppl_ratio: Interval
    mean_kl: Interval
    median_kl: float
    p99_kl: float
    top1: Interval

    @property
    def ppl_ratio(self) -> Interval:
        """Artifact perplexity / reference perplexity."""
        return self.ln_ppl_ratio.exp()

    @property
    def ppl_ratio_seen(self) -> float:
        """The smallest perplexity ratio above 1 that so many windows show in 8 of 10 cases."""
        with np.errstate(over="ignore"):
            return float(np.exp(shift_seen(self.ln_ppl_ratio)))


@dataclass(frozen=True)
class Comparison:
    """Everything measured on one artifact.

    Attributes:
        windows: number of token windows.
        steps: the models, from the original to the artifact.
        differences: ``conversion`` (against the checkpoint it was made from) and ``compression`` (against the
            original model), never mixed.
    """

    windows: int
    steps: tuple[Step, ...]
    differences: Mapping[str, Difference]

    def step(self, name: str) -> Step:
        """Return the step called ``name``."""
        return next(step for step in self.steps if step.name == name)


def measure(
    artifact: Runtime,
    original: Runtime,
    lineage: Mapping[str, Runtime] | None,
    windows: Windows,
    *,
    bytes_per_token: float | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Measure ``artifact`` against the original model and the checkpoint it was made from.

    Args:
        artifact: the artifact in the runtime that ships with it.
        original: the original model.
        lineage: name -> the checkpoints between the two, in the order in which one was made from another; what was
            converted is the last, or the original where there are none. None if that is not known, and there is no
            conversion to judge.
        windows: (windows, tokens) ids.
        bytes_per_token: UTF-8 bytes of the evaluation text over its tokens, for bits per byte.
        progress: where the passes are shown.

    Raises:
        RuntimeFailure: a runtime cannot run its model.
    """
    references = {ORIGINAL: original, **(lineage or {})}
    scores = score(windows, artifact, references, progress)
    runs = [Run.of(name, runtime) for name, runtime in {**references, ARTIFACT: artifact}.items()]
    converted = None if lineage is None else [*references][-1]
    return compare(scores, runs, converted=converted, bytes_per_token=bytes_per_token)


def compare(
    scores: Scores, runs: Sequence[Run], *, converted: str | None, bytes_per_token: float | None = None
) -> Comparison:
    """Return what scores say of the artifact.

    Args:
        scores: of all windows together.
        runs: of every step that has scores, from the original to the artifact.
        converted: the step that the artifact was made from; None if it is not known.
        bytes_per_token: as ``measure`` takes it.
    """
    steps = tuple(_step(run, scores.nll[run.name], bytes_per_token) for run in runs)
    references = {CONVERSION: converted} if converted is not None else {}
    differences = {kind: _difference(name, scores) for kind, name in {**references, COMPRESSION: ORIGINAL}.items()}
    return Comparison(len(scores.nll[ARTIFACT]), steps, differences)


def measuring_bytes(model: Outline, artifact: int, windows: int, tokens: int) -> int:
    """Return the memory that ``measure`` takes at most, the runtime's process included.

    Args:
        model: the original.
        artifact: bytes of the artifact: a runtime may hold a copy of it in another layout.
        windows: evaluation windows.
        tokens: in each of them.
    """
    # The original and the checkpoints run before the runtime starts, and leave their states.
    states = 3 * 4 * windows * tokens * model.hidden_size
    # A window's log-probabilities in float32: of the original, two checkpoints and the artifact, the next window's
    # while these are still held, and the runtime's own rows.
    log_probs = 8 * 4 * tokens * model.vocab_size
    return states + max(layer_pass_bytes(model), log_probs + artifact)


def _step(run: Run, nll: Values, bytes_per_token: float | None) -> Step:
    value, error = perplexity(nll)
    mean = float(nll.mean())
    bits = mean / math.log(2) / bytes_per_token if bytes_per_token else None
    return Step(run.name, run.runtime, run.device, mean, value, error, bits, run.vocab_size)


def _difference(reference: str, scores: Scores) -> Difference:
    divergence = scores.divergence[reference]
    with np.errstate(invalid="ignore"):  # inf - inf: a broken model, judged as such
        gap = scores.nll[ARTIFACT] - scores.nll[reference]
        median, p99 = np.quantile(divergence.kl, [0.5, 0.99])
    means = np.stack([v.mean(axis=1) for v in (gap, divergence.kl, divergence.same_top)], axis=1)
    ratio, kl, top1 = bootstrap_means(means)
    return Difference(reference, gap.size, ratio, kl, float(median), float(p99), top1)
