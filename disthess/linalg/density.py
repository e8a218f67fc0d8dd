"""Spectral density by block stochastic Lanczos quadrature with full reorthogonalisation.

A random block of orthonormal start vectors spans a block Krylov space; the eigenvalues of the projected matrix are quadrature
nodes, and the squared first-block components of its eigenvectors their weights. Each start vector gives an estimate of the
density of its own; their mean is the estimate and their scatter its standard error.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from disthess.linalg.operator import AbstractSymmetricOperator


@dataclass(frozen=True, slots=True)
class DensityResult:
    """A spectral density that integrates to one.

    Attributes:
        grid: Where, ``[points]``.
        density: Eigenvalues per unit of the grid, over ``P``, ``[points]``.
        standard_error: Of each density value, over probes, ``[points]``.
        nodes: Quadrature nodes, ``[m]``.
        weights: Their weights, ``[m]``, summing to one.
        width: Standard deviation of the Gaussian by which nodes are smoothed.
        products: Products with the operator.
        truncation: ``int |density - density of one Lanczos step less|``, at most 2: what further steps would change, about. 0
            where the steps exhausted the space; NaN where there was one step alone.
    """

    grid: np.ndarray
    density: np.ndarray
    standard_error: np.ndarray
    nodes: np.ndarray
    weights: np.ndarray
    width: float
    products: int
    truncation: float = float("nan")

    @property
    def sampling(self) -> float:
        """``int standard_error``: what other probes would change, about."""
        return float(np.trapezoid(self.standard_error, self.grid))

    @property
    def converged(self) -> bool:
        """Whether the error of too few steps is below that of too few probes, or below 1 %."""
        return bool(self.truncation <= max(self.sampling, 0.01))


def spectral_density(
    operator: AbstractSymmetricOperator,
    *,
    probes: int = 8,
    steps: int = 40,
    seed: int = 0,
    points: int = 400,
    width: float | None = None,
) -> DensityResult:
    """Estimate the spectral density.

    All probes are multiplied in one block, so that a store is read once per step. Vectors take ``probes * steps * P * 8`` bytes
    at most.

    Args:
        operator: Symmetric.
        probes: Start vectors, multiplied together.
        steps: Block Lanczos steps; the Krylov space has ``probes * steps`` dimensions at most.
        seed: Of the start vectors.
        points: Of the grid.
        width: Smoothing; default 1 % of the nodes' range.

    Raises:
        ValueError: A count is not positive.
    """
    if min(probes, steps) < 1 or points < 2:
        raise ValueError(f"probes and steps must be positive and points at least 2, got {probes}, {steps}, {points}")
    size = operator.size
    probes = min(probes, size)
    start = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, probes)))[0]
    small, last, exhausted = _krylov(operator, start, min(steps, max(1, size // probes + 1)))
    nodes, vectors = np.linalg.eigh(small)
    squares = vectors[:probes].T ** 2
    spread = float(nodes.max() - nodes.min())
    sigma = width if width is not None else max(0.01 * spread, 1e-12 * max(1.0, float(np.abs(nodes).max())))
    grid = np.linspace(nodes.min() - 5 * sigma, nodes.max() + 5 * sigma, points)
    curves = _smoothed(grid, nodes, squares, sigma)
    error = curves.std(axis=1, ddof=1) / np.sqrt(probes) if probes > 1 else np.full(points, np.nan)
    mean = curves.mean(axis=1)
    truncation = 0.0 if exhausted else float("nan")
    if not exhausted and len(small) > last:
        before, turned = np.linalg.eigh(small[:-last, :-last])
        change = np.abs(mean - _smoothed(grid, before, turned[:probes].T ** 2, sigma).mean(axis=1))
        truncation = float(np.trapezoid(change, grid))
    return DensityResult(grid, mean, error, nodes, squares.mean(axis=1), float(sigma), len(small), truncation)


def _smoothed(grid: np.ndarray, nodes: np.ndarray, squares: np.ndarray, sigma: float) -> np.ndarray:
    """A density of each probe, ``[points, probes]``, from nodes and squared components ``[m, probes]``."""
    kernel = np.exp(-0.5 * ((grid[:, None] - nodes) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
    curves = kernel @ squares
    area = np.trapezoid(curves, grid, axis=0)
    return curves / np.where(area > 0, area, 1.0)


def _krylov(operator: AbstractSymmetricOperator, start: np.ndarray, steps: int) -> tuple[np.ndarray, int, bool]:
    """The operator projected on the block Krylov space, ``[m, m]``, its first rows and columns those of ``start``.

    Besides, the width of its last block, and whether the space is invariant, so that further steps change nothing.

    Each new block is orthogonalised twice against all before it; the space ends early where it is invariant.
    """
    last = start
    # One allocation for all steps, vectors as rows: memory is taken as they are written, and none is copied to grow.
    room = np.empty((min(operator.size, start.shape[1] * steps), operator.size))
    count = start.shape[1]
    room[:count] = start.T
    columns: list[np.ndarray] = []
    exhausted = False
    for step in range(steps):
        # One product for all probes: a store is read once per step.
        image = np.asarray(operator.matmat(last), dtype=np.float64)
        scale = max(float(np.linalg.norm(image)), 1e-300)
        basis = room[:count].T
        border = basis.T @ image
        columns.append(border)
        if step == steps - 1:
            break
        image = image - basis @ border
        image = image - basis @ (basis.T @ image)
        outer, inner = np.linalg.qr(image)
        left, sizes, _ = np.linalg.svd(inner)
        last = outer @ left[:, sizes > 1e-10 * scale][:, : operator.size - count]
        if last.shape[1] == 0:
            exhausted = True
            break
        last = np.linalg.qr(last - basis @ (basis.T @ last))[0]
        room[count : count + last.shape[1]] = last.T
        count += last.shape[1]
    return _assembled(columns), columns[-1].shape[1], exhausted


def _assembled(columns: list[np.ndarray]) -> np.ndarray:
    """The symmetric matrix whose upper block columns are given."""
    size = sum(column.shape[1] for column in columns)
    small = np.zeros((size, size))
    offset = 0
    for column in columns:
        height, width = column.shape
        small[:height, offset : offset + width] = column
        small[offset : offset + width, :height] = column.T
        own = column[offset : offset + width]
        small[offset : offset + width, offset : offset + width] = 0.5 * (own + own.T)
        offset += width
    return small
