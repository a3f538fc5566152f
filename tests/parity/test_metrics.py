"""Figures against what they are by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from parity_fakes import FakeRuntime, random_runtime

from mka_export.errors import MkaError, RuntimeFailure
from mka_export.parity.comparison import measure
from mka_export.parity.metrics import Scores, kl_divergence, score

EVEN = FakeRuntime([0.25, 0.25, 0.25, 0.25], 4)
SKEWED = FakeRuntime([0.5, 0.25, 0.125, 0.125], 4)


def test_known_distributions_give_known_figures() -> None:
    windows = np.array([[3, 0, 1, 2]] * 6)  # predicts 0, 1 and 2; the 3 only comes before
    comparison = measure(SKEWED, EVEN, None, windows, bytes_per_token=3.0)
    original, artifact = comparison.steps
    ln2 = math.log(2)
    assert original.perplexity == pytest.approx(4)
    assert artifact.nll == pytest.approx((1 + 2 + 3) / 3 * ln2)
    assert artifact.bits_per_byte == pytest.approx(2 / 3)
    assert artifact.perplexity_se == pytest.approx(0)
    difference = comparison.differences["compression"]
    assert difference.tokens == 18
    assert difference.ppl_ratio.value == pytest.approx(1)
    assert difference.mean_kl.value == pytest.approx(0.25 * ln2)  # ¼(−1 + 0 + 1 + 1) ln 2
    assert difference.median_kl == difference.p99_kl == pytest.approx(0.25 * ln2)
    assert difference.top1.value == 1


def test_divergence_has_a_direction() -> None:
    windows = np.array([[0, 0]])
    forwards = score(windows, SKEWED, {"original": EVEN}).divergence["original"].kl
    backwards = score(windows, EVEN, {"original": SKEWED}).divergence["original"].kl
    assert forwards[0, 0] == pytest.approx(0.25 * math.log(2))
    assert backwards[0, 0] == pytest.approx((0.5 - 0.125 - 0.125) * math.log(2))


def test_every_position_is_scored_against_the_next_token() -> None:
    rng = np.random.default_rng(0)
    windows = rng.integers(0, 7, (3, 80))  # more than one chunk of rows
    artifact, reference = random_runtime(1), random_runtime(2)
    scores = score(windows, artifact, {"original": reference})
    expected = np.stack(list(reference.log_probs(windows)), dtype=float)[:, :-1]
    found = np.stack(list(artifact.log_probs(windows)), dtype=float)[:, :-1]
    for w, (p, q) in enumerate(zip(expected, found, strict=True)):
        np.testing.assert_allclose(scores.nll["artifact"][w], -q[np.arange(79), windows[w, 1:]], atol=1e-6)
        np.testing.assert_allclose(scores.nll["original"][w], -p[np.arange(79), windows[w, 1:]], atol=1e-6)
        np.testing.assert_allclose(scores.divergence["original"].kl[w], (np.exp(p) * (p - q)).sum(1), atol=1e-6)
        np.testing.assert_array_equal(scores.divergence["original"].same_top[w], p.argmax(1) == q.argmax(1))


def test_steps_lead_from_the_original_to_the_artifact() -> None:
    windows = np.random.default_rng(0).integers(0, 7, (5, 30))
    original, merged, artifact = (random_runtime(seed) for seed in range(3))
    comparison = measure(artifact, original, {"merged": merged}, windows)
    assert [step.name for step in comparison.steps] == ["original", "merged", "artifact"]
    differences = comparison.differences
    assert {kind: d.against for kind, d in differences.items()} == {"conversion": "merged", "compression": "original"}
    alone = measure(artifact, merged, None, windows).differences["compression"]
    assert alone.mean_kl == differences["conversion"].mean_kl
    for kind in differences:
        reference = comparison.step(differences[kind].against)
        gap = comparison.step("artifact").nll - reference.nll
        assert differences[kind].ln_ppl_ratio.value == pytest.approx(gap)


def test_an_unmerged_model_is_run_once_and_is_both_references() -> None:
    windows = np.random.default_rng(0).integers(0, 7, (5, 30))
    original, artifact = random_runtime(0), random_runtime(1)
    comparison = measure(artifact, original, {}, windows)
    assert [step.name for step in comparison.steps] == ["original", "artifact"]
    assert comparison.differences["conversion"] == comparison.differences["compression"]


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 5))
def test_divergence_is_never_negative_and_none_from_itself(seed: int, concentration: float) -> None:
    rng = np.random.default_rng(seed)
    p, q = np.log(np.maximum(rng.dirichlet(np.full(50, concentration), (2, 4)), 1e-30)).astype(np.float32)
    assert (kl_divergence(p, q) >= 0).all()
    assert (kl_divergence(p, p) == 0).all()


def test_ruled_out_tokens() -> None:
    with np.errstate(divide="ignore"):
        sure, even = np.log(np.array([[1.0, 0.0]], np.float32)), np.log(np.array([[0.5, 0.5]], np.float32))
    assert kl_divergence(sure, even)[0] == pytest.approx(math.log(2))
    assert kl_divergence(sure, sure)[0] == 0
    assert kl_divergence(even, sure)[0] == math.inf
    assert math.isnan(kl_divergence(even, np.full((1, 2), np.nan, np.float32))[0])
    assert math.isnan(kl_divergence(np.full((1, 2), np.nan, np.float32), even)[0])


def test_padding_rows_are_left_out_of_the_comparison() -> None:
    padded = FakeRuntime([0.25, 0.125, 0.0625, 0.0625, 0.3, 0.2], 6)  # SKEWED, halved, and two more
    scores = score(np.array([[0, 1, 2]]), padded, {"original": SKEWED})
    np.testing.assert_allclose(scores.divergence["original"].kl, 0, atol=1e-6)
    np.testing.assert_allclose(scores.nll["artifact"], scores.nll["original"], atol=1e-6)


def test_a_token_that_the_artifact_lacks_is_a_failure() -> None:
    with pytest.raises(RuntimeFailure, match="the artifact has 4 tokens; the text uses id 5"):
        score(np.array([[0, 5]]), EVEN, {"original": FakeRuntime([1 / 6] * 6, 6)})


def test_scores_are_read_as_they_were_written(tmp_path: Path) -> None:
    windows = np.random.default_rng(0).integers(0, 7, (5, 30))
    references = {"original": random_runtime(0), "merged": random_runtime(1)}
    scores = score(windows, random_runtime(2), references)
    scores.save(tmp_path / "scores.npz")
    read = Scores.load(tmp_path / "scores.npz")
    assert set(read.nll) == {"original", "merged", "artifact"}
    for name, nll in scores.nll.items():
        np.testing.assert_array_equal(read.nll[name], nll)  # they come from float32
    for name, divergence in scores.divergence.items():
        np.testing.assert_allclose(read.divergence[name].kl, divergence.kl, rtol=1e-7)
        np.testing.assert_array_equal(read.divergence[name].same_top, divergence.same_top)


@pytest.mark.parametrize("data", [b"", b"PK", b"scores"])
def test_what_holds_no_scores(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "scores.npz").write_bytes(data)
    with pytest.raises(MkaError, match="holds no scores"):
        Scores.load(tmp_path / "scores.npz")


def test_objects_in_a_file_of_scores_are_not_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "scores.npz", **{"nll/original": np.array([object()])})
    with pytest.raises(MkaError, match="holds no scores"):
        Scores.load(tmp_path / "scores.npz")
