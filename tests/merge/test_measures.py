"""Diffusion maps and NPIB behave as the paper needs them to, and the other measures as theirs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mka_export.merge.diffusion import diffusion_map, gaussian_kernel
from mka_export.merge.measures import MEASURES, npib

RNG = np.random.default_rng(0)


def swiss_roll(n: int = 300) -> np.ndarray:
    angle = np.sort(RNG.uniform(1.5 * np.pi, 4.5 * np.pi, n))
    return np.stack([angle * np.cos(angle), angle * np.sin(angle), 0.1 * RNG.normal(size=n)], axis=1)


def test_kernel_is_gaussian_with_the_median_distance_as_bandwidth():
    points = np.array([[0.0], [1.0], [3.0]])  # distances 1, 2, 3: median 2
    expected = np.exp(-np.array([[0, 1, 9], [1, 0, 4], [9, 4, 0]]) / (2 * 2.0**2))
    np.testing.assert_allclose(gaussian_kernel(points), expected)


def test_kernel_of_coinciding_points_is_finite():
    assert np.isfinite(gaussian_kernel(np.ones((5, 3)))).all()


def test_coordinates_are_eigenvectors_of_the_diffusion_operator():
    points = RNG.normal(size=(60, 4))
    kernel = gaussian_kernel(points)
    density = kernel.sum(axis=1)
    kernel /= np.outer(density, density)
    operator = kernel / kernel.sum(axis=1, keepdims=True)
    values = np.sort(np.linalg.eigvals(operator).real)[::-1]
    embedding = diffusion_map(points, dimensions=3, time=1)
    for j in range(3):
        column = embedding[:, j]
        np.testing.assert_allclose(operator @ column, values[j + 1] * column, atol=1e-8)


def test_first_coordinate_follows_the_geometry_of_a_curve():
    noisy = np.stack([np.linspace(0, 1, 100), 0.01 * RNG.normal(size=100)], axis=1)
    first = diffusion_map(noisy, 1)[:, 0]
    steps = np.diff(first)
    assert (steps > 0).all() or (steps < 0).all()


@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e4])
def test_embedding_does_not_depend_on_units(factor):
    points = swiss_roll()
    np.testing.assert_allclose(np.abs(diffusion_map(points)), np.abs(diffusion_map(points * factor)), atol=1e-6)


labels = st.lists(st.integers(0, 5), min_size=2, max_size=80)


@given(st.data())
def test_npib_is_symmetric_and_lies_in_the_unit_interval(data):
    one = data.draw(labels)
    other = data.draw(st.lists(st.integers(0, 5), min_size=len(one), max_size=len(one)))
    a, b = np.array([one]), np.array([other])
    assert npib(a, b) == pytest.approx(npib(b, a))
    assert 0.0 <= npib(a, b) <= 1.0


def test_npib_by_hand():
    # H = ln 2 for both; joint has four equal cells, so I = 0; relabelled copies give 1.
    assert npib(np.array([[0, 0, 1, 1]]), np.array([[0, 1, 0, 1]])) == pytest.approx(0.0, abs=1e-12)
    assert npib(np.array([[0, 0, 1, 1]]), np.array([[1, 1, 0, 0]])) == pytest.approx(1.0)
    # joint (1/2, 1/4, 1/4), H(X) = ln 2, H(Y) = 0.5623: I = ln 2 + H(Y) - 1.0397
    h_y = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    expected = (np.log(2) + h_y - 1.5 * np.log(2)) / np.sqrt(np.log(2) * h_y)
    assert npib(np.array([[0, 0, 1, 1]]), np.array([[0, 0, 0, 1]])) == pytest.approx(expected)


def test_npib_of_a_constant_is_zero():
    assert npib(np.zeros((1, 4), dtype=int), np.array([[0, 1, 2, 3]])) == 0.0


def similarity(name: str, one: np.ndarray, other: np.ndarray) -> float:
    measure = MEASURES[name]
    return measure.compare(measure.keep(one), measure.keep(other))


def test_layers_with_the_same_geometry_are_alike_and_others_are_not():
    points = swiss_roll()
    turned = points @ np.linalg.qr(RNG.normal(size=(3, 3)))[0] * 50 + 3
    other = RNG.normal(size=points.shape)
    assert similarity("npib", points, turned) > 0.9
    assert similarity("npib", points, other) < similarity("npib", points, turned) - 0.3


@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_is_symmetric_in_the_unit_interval_and_free_of_units(name):
    one = RNG.normal(size=(80, 6))
    other = one + 0.3 * RNG.normal(size=one.shape)
    assert similarity(name, one, one) == pytest.approx(1.0, abs=1e-3)
    assert similarity(name, one, other) == pytest.approx(similarity(name, other, one))
    assert 0.0 <= similarity(name, one, -other) <= 1.0
    assert 0.0 < similarity(name, one, other) < 1.0
    assert similarity(name, 1e3 * one, 1e3 * other) == pytest.approx(similarity(name, one, other), rel=1e-4)
    assert np.isfinite(similarity(name, np.zeros((80, 6)), one))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # x = (1, 0), (0, 2); y = (1, 1), (0, 2): the angles are 45 and 0 degrees
        ("cosine", (1 + 4) / np.sqrt(5 * 6)),
        ("block-influence", (np.sqrt(0.5) + 1) / 2),
        ("angular", 1 - (0.25 + 0) / 2),
        ("euclidean", 1 - (1 / (1 + np.sqrt(2)) + 0) / 2),
    ],
)
def test_measure_by_hand(name, expected):
    assert similarity(name, np.array([[1.0, 0], [0, 2]]), np.array([[1.0, 1], [0, 2]])) == pytest.approx(expected)


def test_cka_by_hand():
    # centred: x = ±1, y = (±1, ±2): Gram matrices ∝ [[1, -1], [-1, 1]], the same
    assert similarity("cka", np.array([[0.0], [2.0]]), np.array([[0.0, 0], [2, 4]])) == pytest.approx(1.0)
    one, other = np.array([[1.0], [-1], [0]]), np.array([[1.0], [0], [-1]])
    assert similarity("cka", one, other) == pytest.approx(float(one.T @ other) ** 2 / 4)
