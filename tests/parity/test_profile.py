from __future__ import annotations

import math

import numpy as np
import pytest
from parity_fakes import random_runtime

from mka_export.parity.comparison import Run, compare
from mka_export.parity.metrics import Divergence, Scores, score
from mka_export.parity.profile import KL_EDGES, kl_counts, position_bins, profile


@pytest.mark.parametrize(
    ("tokens", "bins"),
    [
        (16, [(1, 15)]),
        (17, [(1, 15), (16, 16)]),
        (64, [(1, 15), (16, 31), (32, 63)]),
        (100, [(1, 15), (16, 31), (32, 63), (64, 99)]),
    ],
)
def test_bins_hold_every_predicted_position_once(tokens: int, bins: list[tuple[int, int]]) -> None:
    assert list(position_bins(tokens)) == bins


def test_perplexity_along_the_window() -> None:
    windows = np.random.default_rng(0).integers(0, 7, (5, 40))
    original, artifact = random_runtime(0), random_runtime(1)
    scores = score(windows, artifact, {"original": original})
    runs = [Run.of("original", original), Run.of("artifact", artifact)]
    found = profile(scores, compare(scores, runs, converted=None))
    bins = found["position"]
    assert [(b["first"], b["last"]) for b in bins] == [(1, 15), (16, 31), (32, 39)]
    expected = np.stack(list(artifact.log_probs(windows)), dtype=float)
    predicted = [expected[w, t - 1, windows[w, t]] for w in range(5) for t in range(16, 32)]
    assert bins[1]["perplexity"]["artifact"] == pytest.approx(math.exp(-np.mean(predicted)))
    assert set(bins[1]["perplexity"]) == {"original", "artifact"}
    assert list(found["kl_histogram"]["counts"]) == ["compression"]
    assert sum(found["kl_histogram"]["counts"]["compression"]) == 5 * 39


def test_tokens_are_counted_between_edges() -> None:
    assert (KL_EDGES[0], KL_EDGES[1], KL_EDGES[-1]) == (1e-6, 3.16e-6, 31.6)
    (counts,) = kl_counts({"x": np.array([[0.0, 1e-7, 1e-6, 2e-6, 1.0, 100.0, math.inf, math.nan]])}).values()
    assert len(counts) == len(KL_EDGES) + 1
    assert (counts[0], counts[1], counts[1 + KL_EDGES.index(1.0)], counts[-1]) == (2, 2, 1, 3)
    assert sum(counts) == 8


def test_a_broken_model_has_a_profile() -> None:
    nll = {"original": np.ones((5, 20)), "artifact": np.full((5, 20), np.inf)}
    scores = Scores(nll, {"original": Divergence(np.full((5, 20), np.nan), np.zeros((5, 20)))})
    runs = [Run(name, "fake", "cpu", 7) for name in nll]
    found = profile(scores, compare(scores, runs, converted="original"))
    assert found["position"][0]["perplexity"] == {"original": pytest.approx(math.e), "artifact": math.inf}
    assert found["kl_histogram"]["counts"]["conversion"][-1] == 100
