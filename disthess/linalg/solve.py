"""Solving with a symmetric matrix and a damping: factorised when it fits, else by MINRES; negative curvature is reported."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import linalg
from scipy.sparse.linalg import minres

from disthess.linalg.lanczos import extreme_eigenpairs
from disthess.linalg.lowrank import LowRankResult
from disthess.linalg.operator import AbstractSymmetricOperator, to_scipy

TOLERANCE = 1e-10
"""Relative residual that an iteration aims at."""


@dataclass(frozen=True, slots=True)
class SolveResult:
    """``x`` of ``(H + damping I) x = b``.

    Attributes:
        solution: ``[P]``.
        residual: ``|(H + damping I) x - b| / |b|``, from a product with H.
        method: ``cholesky``, ``indefinite`` (a symmetric indefinite factorisation), ``minres`` or ``low rank``.
        iterations: Of MINRES, all rounds; 0 for a factorisation.
        converged: Whether the residual is small enough for the method and the dtype.
        smallest_eigenvalue: Of H, where it was found negative enough to make the damped matrix indefinite; else None. A step
            along its eigenvector descends, and the solution is not the minimiser of a quadratic model.
        negative_direction: Its eigenvector, ``[P]``, or None.
        error_bound: Of a low-rank form: ``|x - x_H|`` is at most this, ``x_H`` the solution with H itself; None where nothing is
            promised, or nothing was approximated.
    """

    solution: np.ndarray
    residual: float
    method: str
    iterations: int
    converged: bool
    smallest_eigenvalue: float | None
    negative_direction: np.ndarray | None
    error_bound: float | None = None


def solve_dense(matrix: np.ndarray, right: np.ndarray, damping: float) -> SolveResult:
    """By Cholesky, or by a symmetric indefinite factorisation where the damped matrix has negative eigenvalues.

    Raises:
        ValueError: The damped matrix is singular to working precision.
    """
    shifted = matrix.astype(np.float64)
    shifted[np.diag_indices(len(shifted))] += damping
    try:
        found = linalg.cho_solve(linalg.cho_factor(shifted, lower=True), right)
        method, smallest, direction = "cholesky", None, None
    except linalg.LinAlgError:
        method = "indefinite"
        values, vectors = linalg.eigh(shifted, subset_by_index=(0, 0))
        negative = float(values[0]) < 0
        smallest, direction = (float(values[0]) - damping, vectors[:, 0]) if negative else (None, None)
        try:
            found = linalg.solve(shifted, right, assume_a="sym")
        except (linalg.LinAlgError, linalg.LinAlgWarning):
            found = np.full(len(right), np.nan)
    scale = np.linalg.norm(right) or 1.0
    residual = float(np.linalg.norm(shifted @ found - right) / scale)
    if not residual <= 1e-6:
        raise ValueError(
            f"H + {damping:g} I is singular to working precision (residual {residual:.1e}); give a larger damping"
        )
    return SolveResult(found, residual, method, 0, True, smallest, direction)


def solve_iterative(
    operator: AbstractSymmetricOperator, right: np.ndarray, damping: float, *, max_products: int = 5000, seed: int = 0
) -> SolveResult:
    """By MINRES, which does not need a positive definite matrix; the smallest eigenvalue by Lanczos, to say whether it is one.

    SciPy's stopping rule is relative to ``|H| |x|``, which can be far larger than ``|b|``: what is left is solved for again.
    """
    aim = TOLERANCE if operator.dtype == np.float64 else 1e-6
    count = 0

    def step(_: np.ndarray) -> None:
        nonlocal count
        count += 1

    found, left = np.zeros(len(right)), np.array(right)
    scale, residual = float(np.linalg.norm(right)) or 1.0, np.inf
    while count < max_products:
        correction, _ = minres(
            to_scipy(operator), left, shift=-damping, rtol=aim, maxiter=max_products - count, callback=step
        )
        better = found + correction
        rest = right - np.asarray(operator.matmat(better[:, None]), dtype=np.float64)[:, 0] - damping * better
        after = float(np.linalg.norm(rest)) / scale
        if not after < 0.5 * residual:
            break
        found, left, residual = better, rest, after
        if residual <= aim:
            break
    ends = extreme_eigenpairs(operator, 1, which="smallest", seed=seed, tolerance=1e-6, vectors=True)
    negative = ends.values[0] + damping < 0 and ends.vectors is not None
    smallest = float(ends.values[0]) if negative else None
    direction = ends.vectors[:, 0] if negative and ends.vectors is not None else None
    return SolveResult(found, residual, "minres", count, residual <= 10 * aim, smallest, direction)


def solve_low_rank(low: LowRankResult, right: np.ndarray, damping: float) -> SolveResult:
    """``(V diag V^T + damping I)^-1 b = (b - V diag(l / (l + damping)) V^T b) / damping``, exactly.

    How far that is from the solution with H itself is bounded where the damping exceeds what the form leaves out.

    Raises:
        ValueError: The damped form is singular: no damping, or one that cancels an eigenvalue.
    """
    shifted = low.values + damping
    if damping == 0 or (np.abs(shifted) <= 1e-14 * max(float(np.abs(low.values).max(initial=0.0)), abs(damping))).any():
        raise ValueError(f"the low-rank form plus {damping:g} I is singular; give another damping")
    inside = low.vectors.T @ right
    found = (right - low.vectors @ (low.values / shifted * inside)) / damping
    image = low.vectors @ (low.values * (low.vectors.T @ found)) + damping * found
    residual = float(np.linalg.norm(image - right) / (np.linalg.norm(right) or 1.0))
    lowest = int(np.argmin(low.values)) if len(low.values) else 0
    negative = len(low.values) > 0 and shifted[lowest] < 0
    return SolveResult(
        found, residual, "low rank", 0, True, float(low.values[lowest]) if negative else None,
        low.vectors[:, lowest] if negative else None, _error_bound(low, right, damping),
    )  # fmt: skip


def _error_bound(low: LowRankResult, right: np.ndarray, damping: float) -> float | None:
    """``|E|_2 |b| / (m m')``, m' the smallest eigenvalue of the damped form and m = m' - |E|_2 a bound of that of H's (Weyl)."""
    smallest = damping + min(0.0, float(low.values.min(initial=0.0)))
    below = smallest - low.spectral_bound
    return low.spectral_bound * float(np.linalg.norm(right)) / (smallest * below) if below > 0 else None
