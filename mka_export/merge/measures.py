"""How alike two layers are: the measures.

Each looks at the states that leave two layers at the same token positions, the nodes: X and Y, (nodes, hidden). All
lie in [0, 1], are symmetric, 1 for a layer and itself, and free of the unit of the states. A measure has two parts:
what is kept of a layer, made once, and the comparison of what is kept of two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from mka_export.merge.diffusion import diffusion_map

Array = NDArray[np.float64]
Kept = NDArray[np.generic]
Cells = NDArray[np.int64]  # (partitions, nodes)

DIMENSIONS = 8
CELLS = 16
PARTITIONS = 4


@dataclass(frozen=True)
class Measure:
    """A measure of similarity.

    Attributes:
        title: for people.
        keep: (nodes, hidden) -> what is kept of a layer.
        compare: what is kept of two layers -> their similarity.
    """

    title: str
    keep: Callable[[Array], Kept]
    compare: Callable[[Kept, Kept], float]


MEASURES: dict[str, Measure] = {}
DEFAULT = "npib"


def measure(name: str, title: str, keep: Callable[[Array], Kept]) -> Callable[..., Callable[..., float]]:
    """Register a comparison of what ``keep`` keeps, under the name of ``--measure``."""

    def register(compare: Callable[..., float]) -> Callable[..., float]:
        MEASURES[name] = Measure(title, keep, compare)
        return compare

    return register


def cells(states: Array) -> Cells:
    """Return the cell of each graph node in its layer's diffusion map: (nodes, hidden) -> (partitions, nodes)."""
    from sklearn.cluster import KMeans  # seconds, which bad input need not wait for

    # One thread: the work is small, and the result does not depend on how many there are.
    with threadpool_limits(1):
        embedding = diffusion_map(states, DIMENSIONS)
        count = min(CELLS, len(states))
        partitions = [KMeans(count, n_init=1, random_state=seed).fit_predict(embedding) for seed in range(PARTITIONS)]
    return np.asarray(partitions, dtype=np.int64)


@measure("npib", "normalised mutual information of the diffusion maps", cells)
def npib(one: Cells, other: Cells) -> float:
    """Return S = I(Ψ^l; Ψ^m) / √(H(Ψ^l) H(Ψ^m)) of two layers' diffusion maps Ψ, arXiv 2406.16330; 0 where an H is 0.

    The paper leaves the estimator open. Differential entropies do not serve: they can be negative, and I(X; X) is
    infinite. Here each embedding Ψ is divided into cells by k-means, and the formula is applied, as it stands, to
    the cell numbers; the mean over a few such partitions, each from its own seed, takes out most of what k-means
    leaves to chance.
    """
    return float(np.mean([_npib(a, b) for a, b in zip(one, other, strict=True)]))


def _npib(one: NDArray[np.int64], other: NDArray[np.int64]) -> float:
    joint = np.zeros((one.max() + 1, other.max() + 1))
    np.add.at(joint, (one, other), 1.0 / len(one))
    h_one, h_other = entropy(joint.sum(axis=1)), entropy(joint.sum(axis=0))
    if h_one == 0.0 or h_other == 0.0:
        return 0.0
    information = h_one + h_other - entropy(joint.ravel())
    return float(np.clip(information / np.sqrt(h_one * h_other), 0.0, 1.0))


def entropy(probabilities: Array) -> float:
    """Return the Shannon entropy in nats; the probabilities sum to 1."""
    positive = probabilities[probabilities > 0]
    return float(-(positive * np.log(positive)).sum())


def _states(states: Array) -> NDArray[np.float32]:
    return states.astype(np.float32)


def _unit(states: Array, axis: int | None = None) -> NDArray[np.float32]:
    """Return an array of length 1, or one whose slices along ``axis`` are."""
    return _states(states / np.linalg.norm(states, axis=axis, keepdims=True).clip(1e-30))


def _directions(states: Array) -> NDArray[np.float32]:
    return _unit(states, axis=1)


@measure("cosine", "cosine of all states together", _unit)
def cosine(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Return ⟨X, Y⟩ / (‖X‖ ‖Y‖) of the whole matrices, so that large states count for more; 0 where it is negative."""
    return _share(np.einsum("ij,ij", one, other, dtype=np.float64))


@measure("block-influence", "1 − Block Influence of the layers between", _directions)
def block_influence(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Return 1 − BI = mean_i cos(x_i, y_i), arXiv 2403.03853; 0 where it is negative.

    For neighbours it is the upper layer's Block Influence, for others that of the block between them.
    """
    return _share(float(_cosines(one, other).mean()))


@measure("angular", "1 − angle / π", _directions)
def angular(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Return 1 − mean_i arccos(cos(x_i, y_i)) / π, after arXiv 2403.17887."""
    return 1.0 - float(np.arccos(_cosines(one, other).clip(-1.0, 1.0)).mean() / np.pi)


@measure("euclidean", "1 − relative distance", _states)
def euclidean(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Return 1 − mean_i ‖x_i − y_i‖ / (‖x_i‖ + ‖y_i‖)."""
    lengths = np.linalg.norm(one, axis=1) + np.linalg.norm(other, axis=1)
    return 1.0 - float((np.linalg.norm(one - other, axis=1) / lengths.clip(1e-30)).mean())


def _gram(states: Array) -> NDArray[np.float32]:
    centred = states - states.mean(axis=0)
    return _unit(centred @ centred.T)


@measure("cka", "linear CKA", _gram)
def cka(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Return linear centred kernel alignment ⟨XXᵀ, YYᵀ⟩ / (‖XXᵀ‖ ‖YYᵀ‖), X and Y centred: arXiv 1905.00414."""
    return _share(np.einsum("ij,ij", one, other, dtype=np.float64))


def _cosines(one: NDArray[np.float32], other: NDArray[np.float32]) -> Array:
    return np.asarray(np.einsum("ij,ij->i", one, other), dtype=np.float64)


def _share(value: float) -> float:
    return float(np.clip(value, 0.0, 1.0))
