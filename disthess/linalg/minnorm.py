"""The point of smallest norm in the convex hull of finitely many points, by Wolfe's algorithm on their Gram matrix.

    min |sum_s t_s x_s|^2 = t^T G t   over t >= 0, sum t = 1,   G[s, r] = <x_s, x_r>

The point is unique; the weights need not be. It is 0 exactly if 0 lies in the hull (Gordan: then no direction has a positive
product with every point).
"""

from __future__ import annotations

import numpy as np

TOLERANCE = 1e-12
"""Relative to the largest squared norm: how far optimality may be violated."""


def min_norm_weights(gram: np.ndarray) -> np.ndarray:
    """Weights of the point of smallest norm.

    Args:
        gram: ``[m, m]``, positive semi-definite.

    Returns:
        ``[m]``, non-negative, summing to 1.

    Example:
        >>> points = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
        >>> min_norm_weights(points @ points.T)
        array([0.5, 0.5, 0. ])
    """
    gram = np.asarray(gram, dtype=np.float64)
    scale = max(float(np.diag(gram).max(initial=0.0)), np.finfo(float).tiny)
    corral = [int(np.argmin(np.diag(gram)))]
    weights = np.array([1.0])
    for _ in range(100 * len(gram) + 100):
        products = gram[:, corral] @ weights
        squared = float(weights @ products[corral])
        best = int(np.argmin(products))
        if products[best] >= squared - TOLERANCE * scale or best in corral:
            break
        corral.append(best)
        weights = np.append(weights, 0.0)
        corral, weights = _into_the_hull(gram, corral, weights)
    found = np.zeros(len(gram))
    found[corral] = weights
    return found


def _into_the_hull(gram: np.ndarray, corral: list[int], weights: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Wolfe's minor cycle: walk to the affine minimiser, dropping a point whenever its weight reaches 0."""
    while True:
        affine = _affine_minimiser(gram[np.ix_(corral, corral)])
        if (affine > 1e-14).all():
            return corral, affine
        falling = affine <= 1e-14
        steps = np.where(falling, weights / np.maximum(weights - affine, 1e-300), np.inf)
        weights = weights + float(min(1.0, steps.min())) * (affine - weights)
        drop = int(np.argmin(np.where(falling, weights, np.inf)))
        corral = corral[:drop] + corral[drop + 1 :]
        weights = np.delete(weights, drop)
        weights = np.maximum(weights, 0.0)
        weights = weights / weights.sum()


def _affine_minimiser(gram: np.ndarray) -> np.ndarray:
    """Weights of the smallest point of the affine hull: the solution of the bordered system."""
    size = len(gram)
    bordered = np.ones((size + 1, size + 1))
    bordered[:size, :size] = gram / max(float(np.diag(gram).max()), np.finfo(float).tiny)
    bordered[size, size] = 0.0
    right = np.zeros(size + 1)
    right[size] = 1.0
    return np.linalg.lstsq(bordered, right, rcond=None)[0][:size]
