"""Diffusion maps (Coifman & Lafon 2006), as MKA uses them (arXiv 2406.16330, §3.1)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh

Array = NDArray[np.float64]


def gaussian_kernel(points: Array) -> Array:
    """Return W_ij = exp(-‖x_i - x_j‖² / (2σ²)) with σ the median pairwise distance: (n, d) -> (n, n).

    The median makes the kernel free of scale: activation norms grow by orders of magnitude with depth.
    """
    from sklearn.metrics.pairwise import euclidean_distances  # seconds, which bad input need not wait for

    distances = euclidean_distances(points)
    sigma = float(np.median(distances[np.triu_indices_from(distances, k=1)]))
    if sigma == 0.0:  # more than half of the points coincide: only those are alike
        return np.asarray(distances == 0.0, dtype=np.float64)
    return np.asarray(np.exp(-np.square(distances) / (2.0 * sigma**2)))


def diffusion_map(points: Array, dimensions: int = 8, time: int = 1) -> Array:
    """Embed points by the leading eigenvectors of a random walk on their neighbourhood graph.

    The kernel is first divided by its density (α = 1), so that the embedding follows the geometry of the
    data and not how densely it was sampled. P = D⁻¹W is never formed: D^-½ W D^-½ has the same spectrum
    and real, orthogonal eigenvectors, from which those of P follow.

    Args:
        points: (n, d).
        dimensions: coordinates to return, the constant eigenvector not among them.
        time: steps t of the walk; coordinate j is λ_jᵗ ψ_j.

    Returns:
        (n, min(dimensions, n - 1)).
    """
    kernel = gaussian_kernel(points)
    density = kernel.sum(axis=1)
    kernel /= np.outer(density, density)
    root = np.sqrt(kernel.sum(axis=1))
    symmetric = kernel / np.outer(root, root)
    size = len(points)
    wanted = min(dimensions, size - 1)
    values, vectors = eigh(symmetric, subset_by_index=[size - 1 - wanted, size - 1])
    psi = vectors / root[:, None]
    psi /= np.linalg.norm(psi, axis=0)
    return np.asarray((psi * values**time)[:, :-1][:, ::-1])
