"""Low-rank approximation of a symmetric operator by a randomised range finder, with an error estimate.

Halko, Martinsson and Tropp (2011), algorithms 4.4 and 5.3: an orthonormal Q of the range of ``H`` times random vectors, then the
eigenpairs of ``Q^T H Q``. The error is estimated afterwards from fresh random vectors: ``E |(H - H_r) g|^2 = |H - H_r|_F^2``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from disthess.linalg.operator import AbstractSymmetricOperator

ERROR_PROBES = 10
"""Random vectors of the error estimate."""


@dataclass(frozen=True, slots=True)
class LowRankResult:
    """``H ~ V diag(values) V^T``.

    Attributes:
        values: Largest magnitude first, ``[r]``.
        vectors: Orthonormal, ``[P, r]``.
        error: Estimate of ``|H - V diag V^T|_F``.
        standard_error: Of ``error``.
        relative_error: ``error`` over ``|H|_F`` (estimated too unless given).
        products: Products with the operator.
    """

    values: np.ndarray
    vectors: np.ndarray
    error: float
    standard_error: float
    relative_error: float
    products: int


def low_rank(
    operator: AbstractSymmetricOperator,
    rank: int,
    *,
    oversample: int = 10,
    power: int = 1,
    seed: int = 0,
    frobenius: float | None = None,
) -> LowRankResult:
    """The best ``rank`` eigenpairs that a random range holds.

    Args:
        operator: Symmetric.
        rank: Wanted; at most ``P``.
        oversample: Vectors beyond the rank.
        power: Power iterations, which sharpen a slowly decaying spectrum.
        seed: Of all random vectors.
        frobenius: ``|H|_F`` if it is known.

    Raises:
        ValueError: ``rank`` is not positive.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    size = operator.size
    generator = np.random.default_rng(seed)
    width = min(size, rank + oversample)
    basis = np.linalg.qr(generator.standard_normal((size, width)))[0]
    for _ in range(power + 1):
        basis = np.linalg.qr(np.asarray(operator.matmat(basis), dtype=np.float64))[0]
    small = basis.T @ np.asarray(operator.matmat(basis), dtype=np.float64)
    values, inner = np.linalg.eigh(0.5 * (small + small.T))
    order = np.argsort(-np.abs(values), kind="stable")[: min(rank, size)]
    values, vectors = values[order], basis @ inner[:, order]
    probes = generator.standard_normal((size, ERROR_PROBES))
    image = np.asarray(operator.matmat(probes), dtype=np.float64)
    left = image - vectors @ (values[:, None] * (vectors.T @ probes))
    squares = (left**2).sum(axis=0)
    error = float(np.sqrt(squares.mean()))
    spread = float(squares.std(ddof=1) / np.sqrt(ERROR_PROBES))
    whole = float(np.sqrt((image**2).sum(axis=0).mean())) if frobenius is None else frobenius
    return LowRankResult(
        values,
        vectors,
        error,
        spread / (2 * error) if error > 0 else 0.0,
        error / whole if whole > 0 else 0.0,
        (power + 2) * width + ERROR_PROBES,
    )
