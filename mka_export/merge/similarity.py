"""How alike two layers are: normalised mutual information between their diffusion maps.

arXiv 2406.16330 defines S_lm = I(Ψ^l; Ψ^m) / √(H(Ψ^l) H(Ψ^m)) and leaves the estimator open. Differential
entropies do not serve: they can be negative, and I(X; X) is infinite. Here each embedding Ψ is divided into
cells by k-means, and the formula is applied, as it stands, to the cell numbers; the mean over a few such
partitions, each from its own seed, takes out most of what k-means leaves to chance. So S_ll = 1, S is
symmetric, lies in [0, 1], and does not depend on the units or the rotation of the embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from mka_export.merge.diffusion import diffusion_map

Cells = NDArray[np.int64]  # (partitions, nodes)

DIMENSIONS = 8
CELLS = 16
PARTITIONS = 4


def cells(states: NDArray[np.float64]) -> Cells:
    """Return the cell of each graph node in its layer's diffusion map: (nodes, hidden) -> (partitions, nodes)."""
    from sklearn.cluster import KMeans  # seconds, which bad input need not wait for

    # One thread: the work is small, and the result does not depend on how many there are.
    with threadpool_limits(1):
        embedding = diffusion_map(states, DIMENSIONS)
        count = min(CELLS, len(states))
        partitions = [KMeans(count, n_init=1, random_state=seed).fit_predict(embedding) for seed in range(PARTITIONS)]
    return np.asarray(partitions, dtype=np.int64)


def npib(one: Cells, other: Cells) -> float:
    """Return the mean over partitions of I / √(H H), in [0, 1]; 0 where an entropy is 0."""
    return float(np.mean([_npib(a, b) for a, b in zip(one, other, strict=True)]))


def _npib(one: NDArray[np.int64], other: NDArray[np.int64]) -> float:
    joint = np.zeros((one.max() + 1, other.max() + 1))
    np.add.at(joint, (one, other), 1.0 / len(one))
    h_one, h_other = entropy(joint.sum(axis=1)), entropy(joint.sum(axis=0))
    if h_one == 0.0 or h_other == 0.0:
        return 0.0
    information = h_one + h_other - entropy(joint.ravel())
    return float(np.clip(information / np.sqrt(h_one * h_other), 0.0, 1.0))


def entropy(probabilities: NDArray[np.float64]) -> float:
    """Return the Shannon entropy in nats; the probabilities sum to 1."""
    positive = probabilities[probabilities > 0]
    return float(-(positive * np.log(positive)).sum())


def similarity_matrix(layers: Sequence[Cells]) -> NDArray[np.float64]:
    """Return S: (layers, layers), symmetric, ones on the diagonal."""
    matrix = np.eye(len(layers))
    for i, one in enumerate(layers):
        for j in range(i):
            matrix[i, j] = matrix[j, i] = npib(one, layers[j])
    return matrix
