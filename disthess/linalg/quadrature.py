"""How eigenvalues are spread, from Lanczos quadratures: one for each of several independent random vectors.

For a unit vector x, k steps of Lanczos give k nodes and weights that integrate every polynomial of degree below 2 k exactly against
the measure that x sees, ``mu_x = sum_i (x . v_i)^2 delta(lambda_i)``. For x uniform on the sphere, ``E mu_x`` is the spectrum, each
eigenvalue with weight 1 / P. Vectors are independent, so that scatter over them is an honest standard error.

A share of the spectrum below a point x has two errors. The quadrature cannot see where between two nodes the measure lies, but
there are bounds (Chebyshev, Markov, Stieltjes): with m nodes below x, the sum of the first m - 1 weights is at most what the vector
sees, and of the first m + 1 at least. And what a vector sees of a share p has variance ``2 p (1 - p) / (P + 2)``, as a proportion
of ``(P + 2) / 2`` has: the interval is Wilson's. Intervals hold both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from disthess.linalg.moments import Ranged
from disthess.linalg.operator import AbstractSymmetricOperator

POINTS = 400
"""Of the grid of a density."""

EXHAUSTED = 1e-12
"""What is left of a vector, relative to the operator, at which its Krylov space is whole."""


@dataclass(frozen=True, slots=True)
class Quadrature:
    """What one random vector saw.

    Attributes:
        nodes: Ascending, ``[k]``.
        weights: Of the nodes; their sum is 1.
        residuals: ``|H y - node y|`` of the unit vector y that belongs to each node.
        whole: Whether the Krylov space is invariant, so that the nodes are eigenvalues.
    """

    nodes: np.ndarray
    weights: np.ndarray
    residuals: np.ndarray
    whole: bool


@dataclass(frozen=True, slots=True)
class Quadratures:
    """Those of all vectors.

    Attributes:
        each: One per vector.
        size: ``P``.
        products: Products taken.
        orthogonal: Whether bases were kept orthogonal. Where they were not, for lack of memory, an extreme eigenvalue may appear
            as several nodes that share its weight.
        seed: Of the vectors; None where there are none.
    """

    each: tuple[Quadrature, ...]
    size: int
    products: int
    orthogonal: bool
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Spread:
    """A spectral density that integrates to 1.

    Attributes:
        grid: Where, ``[points]``.
        value: Density there.
        error: Standard error over the vectors.
        width: Standard deviation of the Gaussian that nodes are smoothed by.
        products: Taken for it.
        seed: Of the vectors; None where it is exact.
        how: It was made, in a sentence.
    """

    grid: np.ndarray
    value: np.ndarray
    error: np.ndarray
    width: float
    products: int = 0
    seed: int | None = None
    how: str = ""


def quadrature_bytes(size: int, probes: int, steps: int, memory_bytes: int) -> int:
    """What `take_quadratures` keeps: bases as long as one fits, and three vectors for each of those multiplied together.

    >>> quadrature_bytes(1000, 8, 40, 10**9)
    2752000
    """
    together = _together(size, probes, steps, memory_bytes)
    kept = together * steps if together * steps * size * 8 <= memory_bytes else 0
    return (kept + 3 * together) * size * 8


def take_quadratures(
    operator: AbstractSymmetricOperator, *, probes: int = 8, steps: int = 40, seed: int = 0, memory_bytes: int = 2**30
) -> Quadratures:
    """Lanczos from several random vectors, each by itself, multiplied together.

    Args:
        operator: Symmetric, ``[P, P]``.
        probes: Vectors.
        steps: Products of each at most.
        seed: Of the vectors.
        memory_bytes: Of the bases; where not even one fits, vectors are not kept orthogonal.

    Raises:
        ValueError: A count is not positive.
    """
    if min(probes, steps) < 1:
        raise ValueError(f"probes and steps must be positive, got {probes} and {steps}")
    steps = min(steps, operator.size)
    generator = np.random.default_rng(seed)
    together = _together(operator.size, probes, steps, memory_bytes)
    orthogonal = together * steps * operator.size * 8 <= memory_bytes
    found: list[Quadrature] = []
    products = 0
    for first in range(0, probes, together):
        start = generator.standard_normal((min(together, probes - first), operator.size))
        taken, count = _lanczos(operator, start, steps, orthogonal)
        found.extend(taken)
        products += count
    return Quadratures(tuple(found), operator.size, products, orthogonal, seed)


def smooth(quadratures: Quadratures, *, points: int = POINTS, width: float | None = None) -> Spread:
    """The density, each node a Gaussian.

    Args:
        quadratures: Of the operator.
        points: Of the grid.
        width: Of the Gaussians; default 1 % of the nodes' range.
    """
    nodes = np.concatenate([one.nodes for one in quadratures.each])
    spread = float(nodes.max() - nodes.min())
    sigma = width if width is not None else max(0.01 * spread, 1e-12 * max(1.0, float(np.abs(nodes).max())))
    grid = np.linspace(nodes.min() - 5 * sigma, nodes.max() + 5 * sigma, points)
    curves = np.stack([_curve(grid, one.nodes, one.weights, sigma) for one in quadratures.each])
    count = len(curves)
    error = curves.std(axis=0, ddof=1) / np.sqrt(count) if count > 1 else np.full(points, np.nan)
    how = f"{count} Lanczos quadratures of {max(len(one.nodes) for one in quadratures.each)} steps"
    if all(one.whole for one in quadratures.each):
        how += ", after which nothing is left to see"
    if not quadratures.orthogonal:
        how += ", their vectors not kept orthogonal for lack of memory"
    return Spread(grid, curves.mean(axis=0), error, float(sigma), quadratures.products, quadratures.seed, how)


def smooth_eigenvalues(eigenvalues: np.ndarray, *, points: int = POINTS) -> Spread:
    """The same of eigenvalues that are all known, from a matrix formed by a product for each; its error is 0."""
    one = Quadrature(eigenvalues, np.full(len(eigenvalues), 1 / len(eigenvalues)), np.zeros(len(eigenvalues)), True)
    count = len(eigenvalues)
    found = smooth(Quadratures((one,), count, count, True), points=points)
    how = f"all {count} eigenvalues of the exact matrix"
    return Spread(found.grid, found.value, np.zeros(points), found.width, count, None, how)


def share_below(quadratures: Quadratures, place: float, *, confidence: float = 0.95) -> Ranged:
    """Share of the eigenvalues that are smaller than ``place``.

    Args:
        quadratures: Of the operator.
        place: Where.
        confidence: Of the sample's part of the interval; the quadrature's part are bounds.

    Example:
        >>> from disthess.linalg.operator import DenseOperator
        >>> taken = take_quadratures(DenseOperator(np.diag(np.arange(-2.0, 2.0))), probes=4, steps=4)
        >>> found = share_below(taken, 0.0)
        >>> found.low <= 0.5 <= found.high
        True
    """
    value, low, high = np.array([_bounds(one, place) for one in quadratures.each]).mean(axis=0)
    count = 0.5 * len(quadratures.each) * (quadratures.size + 2)
    reach = float(stats.norm.ppf(0.5 * (1 + confidence)))
    bottom, top = _wilson(float(low), count, -reach), _wilson(float(high), count, reach)
    return Ranged(float(value), min(bottom, float(value)), max(top, float(value)))


def _wilson(share: float, count: float, reach: float) -> float:
    """The p for which ``share`` is ``-reach`` standard errors ``sqrt(p (1 - p) / count)`` from it."""
    centre = share + reach**2 / (2 * count)
    half = reach * np.sqrt(share * (1 - share) / count + reach**2 / (4 * count**2))
    return float(np.clip((centre + half) / (1 + reach**2 / count), 0.0, 1.0))


def ends(quadratures: Quadratures) -> tuple[Ranged, Ranged]:
    """Smallest and largest eigenvalue: the most extreme nodes, whose residuals say how far an eigenvalue may be."""
    lowest = min(quadratures.each, key=lambda one: float(one.nodes[0]))
    highest = max(quadratures.each, key=lambda one: float(one.nodes[-1]))
    low, high = float(lowest.nodes[0]), float(highest.nodes[-1])
    return Ranged(low, low - float(lowest.residuals[0]), low), Ranged(high, high, high + float(highest.residuals[-1]))


def _together(size: int, probes: int, steps: int, memory_bytes: int) -> int:
    fit = memory_bytes // (steps * size * 8)
    return max(1, min(probes, fit))


def _bounds(one: Quadrature, place: float) -> tuple[float, float, float]:
    """Share below, and its bounds by the theorem."""
    summed = np.concatenate([[0.0], np.cumsum(one.weights)])
    below = int(np.searchsorted(one.nodes, place, side="left"))
    if one.whole:
        return (float(summed[below]),) * 3
    return float(summed[below]), float(summed[max(below - 1, 0)]), float(summed[min(below + 1, len(one.nodes))])


def _curve(grid: np.ndarray, nodes: np.ndarray, weights: np.ndarray, sigma: float) -> np.ndarray:
    kernel = np.exp(-0.5 * ((grid[:, None] - nodes) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
    curve = kernel @ weights
    area = float(np.trapezoid(curve, grid))
    return curve / area if area > 0 else curve


def _lanczos(
    operator: AbstractSymmetricOperator, start: np.ndarray, steps: int, orthogonal: bool
) -> tuple[list[Quadrature], int]:
    """Quadratures of the rows of ``start``."""
    count, size = start.shape
    last = start / np.linalg.norm(start, axis=1, keepdims=True)
    before = np.zeros_like(last)
    kept = np.empty((steps if orthogonal else 0, count, size))
    alphas, betas = np.zeros((steps, count)), np.zeros((steps, count))
    lengths = np.zeros(count, dtype=int)
    alive = np.arange(count)
    products, scale = 0, 0.0
    for step in range(steps):
        if orthogonal:
            kept[step] = last
        image = np.zeros_like(last)
        image[alive] = np.asarray(operator.matmat(last[alive].T), dtype=np.float64).T
        products += len(alive)
        scale = max(scale, float(np.linalg.norm(image, axis=1).max()))
        alphas[step] = np.einsum("kp,kp->k", last, image)
        image -= alphas[step][:, None] * last + betas[step - 1][:, None] * before
        if orthogonal:
            for row in alive:
                held = kept[: step + 1, row]
                for _ in range(2):
                    image[row] -= held.T @ (held @ image[row])
        betas[step] = np.linalg.norm(image, axis=1)
        lengths[alive] = step + 1
        alive = alive[betas[step, alive] > EXHAUSTED * max(scale, 1e-300)]
        if len(alive) == 0:
            break
        before = last
        last = np.zeros_like(image)
        last[alive] = image[alive] / betas[step, alive][:, None]
    return [
        _quadrature(alphas[:length, row], betas[:length, row], row not in alive) for row, length in enumerate(lengths)
    ], products


def _quadrature(alphas: np.ndarray, betas: np.ndarray, whole: bool) -> Quadrature:
    nodes, vectors = np.linalg.eigh(np.diag(alphas) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1))
    return Quadrature(nodes, vectors[0] ** 2, betas[-1] * np.abs(vectors[-1]), whole or len(alphas) == 0)
