"""Trace and Frobenius norm from random vectors, with standard errors.

The trace is Hutch++ (Meyer, Musco, Musco and Woodruff 2021); the norm comes from ``E |H g|^2 = |H|_F^2`` for Gaussian ``g``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from disthess.linalg.operator import AbstractSymmetricOperator

TOLERANCE = 0.05
"""Relative standard error that counts as converged where nothing else is asked for."""

MOST = 20
"""Times the products asked for that a tolerance may take."""


@dataclass(frozen=True, slots=True)
class TraceResult:
    """An estimate of the trace.

    Attributes:
        value: The estimate.
        standard_error: Of the estimate; 0 where it is exact.
        products: Products with the operator.
        tolerance: What ``converged`` is judged by.
    """

    value: float
    standard_error: float
    products: int
    tolerance: float = TOLERANCE

    @property
    def converged(self) -> bool:
        """Whether the standard error is at most ``tolerance`` times the magnitude of the value; exact ones always are."""
        return self.standard_error == 0 or self.standard_error <= self.tolerance * abs(self.value)


def estimate_trace(
    operator: AbstractSymmetricOperator, *, probes: int = 48, seed: int = 0, tolerance: float | None = None
) -> TraceResult:
    """Trace of a symmetric operator from about ``probes`` products.

    A third finds the range, a third gives the trace on it exactly, a third estimates the rest.

    Args:
        operator: Symmetric.
        probes: Products, about.
        seed: Of the random signs.
        tolerance: Where it is given, further estimates of the rest are added until ``converged``, up to `MOST` times as many
            products in all.

    Raises:
        ValueError: Fewer than 6 probes, or a tolerance that is not positive.
    """
    if probes < 6:
        raise ValueError(f"a trace needs at least 6 probes, got {probes}")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    allowed = TOLERANCE if tolerance is None else tolerance
    size = operator.size
    third = min(probes // 3, size)
    generator = np.random.default_rng(seed)
    sketch = operator.matmat(generator.choice([-1.0, 1.0], size=(size, third)))
    basis = np.linalg.qr(np.asarray(sketch, dtype=np.float64))[0]
    exact = float(np.einsum("pk,pk->", basis, operator.matmat(basis)))
    if third >= size:
        return TraceResult(exact, 0.0, 2 * third, allowed)
    terms = np.empty(0)
    while True:
        signs = generator.choice([-1.0, 1.0], size=(size, third))
        rest = signs - basis @ (basis.T @ signs)
        terms = np.concatenate([terms, np.einsum("pk,pk->k", rest, operator.matmat(rest))])
        error = float(terms.std(ddof=1) / np.sqrt(len(terms))) if len(terms) > 1 else float("nan")
        found = TraceResult(exact + float(terms.mean()), error, 2 * third + len(terms), allowed)
        if tolerance is None or found.converged or found.products + third > MOST * 3 * third:
            return found


@dataclass(frozen=True, slots=True)
class NormResult:
    """An estimate of a Frobenius norm.

    Attributes:
        value: The estimate.
        standard_error: Of the estimate.
        products: Products with the operator.
    """

    value: float
    standard_error: float
    products: int


def estimate_frobenius(operator: AbstractSymmetricOperator, *, probes: int = 48, seed: int = 0) -> NormResult:
    """Frobenius norm of a symmetric operator from ``probes`` products.

    Raises:
        ValueError: Fewer than 2 probes.
    """
    if probes < 2:
        raise ValueError(f"a norm needs at least 2 probes, got {probes}")
    vectors = np.random.default_rng(seed).standard_normal((operator.size, probes))
    squares = (np.asarray(operator.matmat(vectors), dtype=np.float64) ** 2).sum(axis=0)
    value = float(np.sqrt(squares.mean()))
    spread = float(squares.std(ddof=1) / np.sqrt(probes))
    return NormResult(value, spread / (2 * value) if value > 0 else 0.0, probes)
