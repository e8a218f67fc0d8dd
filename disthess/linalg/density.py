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
    """

    grid: np.ndarray
    density: np.ndarray
    standard_error: np.ndarray
    nodes: np.ndarray
    weights: np.ndarray
    width: float
    products: int


def spectral_density(
    operator: AbstractSymmetricOperator,
    *,
    probes: int = 8,
    steps: int = 60,
    seed: int = 0,
    points: int = 400,
    width: float | None = None,
) -> DensityResult:
    """Estimate the spectral density.

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
    basis, products = _krylov(operator, start, min(steps, max(1, size // probes + 1)))
    nodes, squares = _project(operator, basis, probes)
    products += basis.shape[1]
    spread = float(nodes.max() - nodes.min())
    sigma = width if width is not None else max(0.01 * spread, 1e-12 * max(1.0, float(np.abs(nodes).max())))
    grid = np.linspace(nodes.min() - 5 * sigma, nodes.max() + 5 * sigma, points)
    kernel = np.exp(-0.5 * ((grid[:, None] - nodes) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
    curves = kernel @ squares
    area = np.trapezoid(curves, grid, axis=0)
    curves = curves / np.where(area > 0, area, 1.0)
    error = curves.std(axis=1, ddof=1) / np.sqrt(probes) if probes > 1 else np.full(points, np.nan)
    return DensityResult(grid, curves.mean(axis=1), error, nodes, squares.mean(axis=1), float(sigma), products)


def _krylov(operator: AbstractSymmetricOperator, start: np.ndarray, steps: int) -> tuple[np.ndarray, int]:
    """An orthonormal basis of the block Krylov space, orthogonalised twice against all of it; stops at breakdown."""
    blocks = [start]
    products = 0
    for _ in range(steps - 1):
        image = np.asarray(operator.matmat(blocks[-1]), dtype=np.float64)
        products += image.shape[1]
        scale = np.linalg.norm(image)
        for _ in range(2):
            for block in blocks:
                image = image - block @ (block.T @ image)
        left, sizes, _ = np.linalg.svd(image, full_matrices=False)
        kept = sizes > 1e-10 * max(scale, 1e-300)
        room = operator.size - sum(block.shape[1] for block in blocks)
        new = left[:, kept][:, : max(room, 0)]
        if new.shape[1] == 0:
            break
        for block in blocks:
            new = new - block @ (block.T @ new)
        blocks.append(np.linalg.qr(new)[0])
    return np.concatenate(blocks, axis=1), products


def _project(operator: AbstractSymmetricOperator, basis: np.ndarray, probes: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes, and the weight of each node for each probe, ``[m]`` and ``[m, probes]``."""
    image = np.empty_like(basis)
    for first in range(0, basis.shape[1], 16):
        image[:, first : first + 16] = operator.matmat(basis[:, first : first + 16])
    small = basis.T @ image
    nodes, vectors = np.linalg.eigh(0.5 * (small + small.T))
    return nodes, vectors[:probes].T ** 2
