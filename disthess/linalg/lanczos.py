"""Eigenpairs at the ends of the spectrum, with the residual of each.

Block Lanczos with full reorthogonalisation and thick restarts, a dense solve for small matrices. Products take blocks of
vectors, because a store is read once per product whatever the block's width. ARPACK is not used: its tolerance is relative to each
eigenvalue, so that a cluster near zero beside a large one never ends.

1. Start from a random orthonormal block; keep a basis V and HV.
2. Rayleigh-Ritz on V gives pairs whose residuals ``|H v - lambda v|`` are known exactly from HV.
3. Stop when every wanted residual is at most ``tolerance`` times the largest magnitude seen; else grow V by the orthonormalised
   residuals of the worst wanted pairs (after a block start that is the next Krylov block).
4. When V is full, keep the Ritz vectors nearest the wanted ends and go on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import numpy as np
from typing_extensions import override

from disthess.linalg.operator import AbstractSymmetricOperator

Which = Literal["both", "largest", "smallest"]

BLOCK = 8
"""Vectors multiplied at once."""

MAX_BASIS = 400
"""Vectors kept, at least; ``16 P`` bytes each."""

MAX_PRODUCTS = 20_000
"""Products after which what has been found is returned, with residuals that say how far it got."""

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
        converged: Whether each residual is within ``tolerance`` times the largest magnitude in the spectrum, ``[k]``.
        tolerance: As used.
    """

    values: np.ndarray
    residuals: np.ndarray
    vectors: np.ndarray | None
    products: int
    converged: np.ndarray
    tolerance: float


@final
class _Counting(AbstractSymmetricOperator):
    """Counts products, in float64."""

    def __init__(self, inner: AbstractSymmetricOperator) -> None:
        self.inner = inner
        self.count = 0

    @property
    @override
    def size(self) -> int:
        return self.inner.size

    @property
    @override
    def dtype(self) -> np.dtype:
        return np.dtype(np.float64)

    @override
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
        tolerance: Residual over the largest magnitude that counts as converged; default 1e-9 in float64, 1e-6 in float32.
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
    allowed = (1e-9 if operator.dtype == np.float64 else 1e-6) if tolerance is None else tolerance
    ends = 2 if which == "both" else 1
    if operator.size <= max(DENSE_SIZE, 2 * ends * k + 1):
        basis, scale = _dense(counted, k, which)
    else:
        basis, scale = _iterative(counted, k, which, seed, allowed)
    image = counted.matmat(basis)
    values = np.einsum("pk,pk->k", basis, image)
    order = np.argsort(values, kind="stable")
    values, basis, image = values[order], basis[:, order], image[:, order]
    residuals = np.linalg.norm(image - basis * values, axis=0)
    return EigenResult(
        values, residuals, basis if vectors else None, counted.count, residuals <= 2 * allowed * scale, allowed
    )


def _dense(operator: _Counting, k: int, which: Which) -> tuple[np.ndarray, float]:
    matrix = operator.matmat(np.eye(operator.size))
    values, basis = np.linalg.eigh(0.5 * (matrix + matrix.T))
    size = operator.size
    low = list(range(min(k, size))) if which != "largest" else []
    high = list(range(max(size - k, 0), size)) if which != "smallest" else []
    return basis[:, sorted({*low, *high})], max(float(np.abs(values).max()), np.finfo(np.float64).tiny)


def _iterative(operator: _Counting, k: int, which: Which, seed: int, tolerance: float) -> tuple[np.ndarray, float]:
    generator = np.random.default_rng(seed)
    wanted = 2 * k if which == "both" else k
    limit = min(operator.size, max(MAX_BASIS, 4 * wanted + 4 * BLOCK))
    basis = np.linalg.qr(generator.standard_normal((operator.size, BLOCK)))[0]
    image = operator.matmat(basis)
    small = basis.T @ image
    while True:
        values, inner = np.linalg.eigh(0.5 * (small + small.T))
        ends = _ends(len(values), k, which)
        residuals = image @ inner[:, ends] - (basis @ inner[:, ends]) * values[ends]
        sizes = np.linalg.norm(residuals, axis=0)
        scale = max(float(np.abs(values).max()), np.finfo(np.float64).tiny)
        enough = len(ends) == wanted and bool((sizes <= tolerance * scale).all())
        if enough or operator.count >= MAX_PRODUCTS:
            return basis @ inner[:, ends], scale
        if basis.shape[1] + BLOCK > limit:
            kept = _ends(len(values), wanted + BLOCK if which != "both" else k + BLOCK, which)
            basis, image, small = basis @ inner[:, kept], image @ inner[:, kept], np.diag(values[kept])
        fresh = _orthonormal(residuals[:, np.argsort(-sizes, kind="stable")[:BLOCK]], basis, generator)
        if fresh.shape[1] == 0:
            return basis @ inner[:, ends], scale
        moved = operator.matmat(fresh)
        border = basis.T @ moved
        small = np.block([[small, border], [border.T, fresh.T @ moved]])
        basis = np.concatenate([basis, fresh], axis=1)
        image = np.concatenate([image, moved], axis=1)


def _ends(size: int, k: int, which: Which) -> np.ndarray:
    """Positions of the wanted ones among ascending values."""
    low = range(min(k, size)) if which != "largest" else range(0)
    high = range(max(size - k, 0), size) if which != "smallest" else range(0)
    return np.array(sorted({*low, *high}))


def _orthonormal(block: np.ndarray, basis: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The block made orthonormal to the basis, twice; random directions in place of what vanishes, up to a full block."""
    room = basis.shape[0] - basis.shape[1]
    width = min(BLOCK, room)
    norms = np.linalg.norm(block, axis=0)
    columns = block[:, norms > 0] / norms[norms > 0]
    if columns.shape[1] < width:
        columns = np.concatenate(
            [columns, generator.standard_normal((basis.shape[0], width - columns.shape[1]))], axis=1
        )
    for _ in range(2):
        columns = columns - basis @ (basis.T @ columns)
        columns = np.linalg.qr(columns[:, :width])[0]
    return columns
