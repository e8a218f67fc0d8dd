"""Eigenpairs at the ends of the spectrum, with the residual of each.

SciPy's thick-restarted Lanczos (ARPACK) where it applies, a dense solve for small matrices. Residuals ``|H v - lambda v|`` are
computed afterwards from the operator itself, so that convergence is shown, not claimed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.sparse.linalg import ArpackNoConvergence, eigsh

from disthess.linalg.operator import AbstractSymmetricOperator, to_scipy

Which = Literal["both", "largest", "smallest"]

DENSE_SIZE = 600
"""Up to this size all eigenvalues are found at once, from the dense matrix."""


@dataclass(frozen=True, slots=True)
class EigenResult:
    """Eigenpairs.

    Attributes:
        values: Ascending, ``[k]``.
        residuals: ``|H v - lambda v|_2`` of each unit vector, ``[k]``.
        vectors: ``[P, k]``, or None if not asked for.
        products: Products with the operator that were needed.
        converged: Whether each residual is within ``tolerance`` times the largest magnitude found, ``[k]``.
        tolerance: As used.
    """

    values: np.ndarray
    residuals: np.ndarray
    vectors: np.ndarray | None
    products: int
    converged: np.ndarray
    tolerance: float


class _Counting(AbstractSymmetricOperator):
    """Counts products."""

    def __init__(self, inner: AbstractSymmetricOperator) -> None:
        self.inner = inner
        self.count = 0

    @property
    def size(self) -> int:
        return self.inner.size

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float64)

    def matmat(self, block: np.ndarray) -> np.ndarray:
        self.count += block.shape[1]
        return np.asarray(self.inner.matmat(block), dtype=np.float64)


def extreme_eigenpairs(
    operator: AbstractSymmetricOperator,
    k: int,
    *,
    which: Which = "both",
    seed: int = 0,
    tolerance: float | None = None,
    vectors: bool = False,
) -> EigenResult:
    """The ``k`` largest, ``k`` smallest (most negative), or ``k`` of each.

    Args:
        operator: Symmetric.
        k: How many at each end asked for; fewer where the matrix is smaller.
        which: ``both``, ``largest`` or ``smallest``.
        seed: Of the start vector.
        tolerance: Relative residual that counts as converged; default 1e-8 in float64, 1e-5 in float32.
        vectors: Whether to return them.

    Returns:
        Values in ascending order, each with its residual.

    Raises:
        ValueError: ``k`` is not positive, or ``which`` is unknown.

    Example:
        >>> from disthess.linalg.operator import DenseOperator
        >>> extreme_eigenpairs(DenseOperator(np.diag([3.0, -1.0, 2.0])), 1).values.tolist()
        [-1.0, 3.0]
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if which not in ("both", "largest", "smallest"):
        raise ValueError(f"which must be both, largest or smallest, got {which!r}")
    counted = _Counting(operator)
    allowed = (1e-8 if operator.dtype == np.float64 else 1e-5) if tolerance is None else tolerance
    ends = 2 if which == "both" else 1
    if operator.size <= max(DENSE_SIZE, 2 * ends * k + 1):
        basis = _dense(counted, k, which)
    else:
        basis = _iterative(counted, k, which, seed, allowed)
    image = counted.matmat(basis)
    values = np.einsum("pk,pk->k", basis, image)
    order = np.argsort(values, kind="stable")
    values, basis, image = values[order], basis[:, order], image[:, order]
    residuals = np.linalg.norm(image - basis * values, axis=0)
    scale = max(float(np.abs(values).max(initial=0.0)), np.finfo(np.float64).tiny)
    return EigenResult(
        values, residuals, basis if vectors else None, counted.count, residuals <= 10 * allowed * scale, allowed
    )


def _dense(operator: _Counting, k: int, which: Which) -> np.ndarray:
    matrix = operator.matmat(np.eye(operator.size))
    basis = np.linalg.eigh(0.5 * (matrix + matrix.T))[1]
    size = operator.size
    low = list(range(min(k, size))) if which != "largest" else []
    high = list(range(max(size - k, 0), size)) if which != "smallest" else []
    return basis[:, sorted({*low, *high})]


def _iterative(operator: _Counting, k: int, which: Which, seed: int, tolerance: float) -> np.ndarray:
    start = np.random.default_rng(seed).standard_normal(operator.size)
    wanted = {"both": "BE", "largest": "LA", "smallest": "SA"}[which]
    count = 2 * k if which == "both" else k
    if not np.any(operator.matmat(start[:, None])):
        return np.linalg.qr(np.random.default_rng(seed).standard_normal((operator.size, count)))[0]
    try:
        return np.asarray(
            eigsh(to_scipy(operator), k=count, which=wanted, v0=start, tol=tolerance, ncv=min(operator.size, max(4 * count, 40)))[1]
        )
    except ArpackNoConvergence as partial:
        if partial.eigenvectors.shape[1]:
            return np.asarray(partial.eigenvectors)
        raise
