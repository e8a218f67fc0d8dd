"""Trace and Frobenius norm from random vectors, with standard errors.

The trace is Hutch++ (Meyer, Musco, Musco and Woodruff 2021); the norm comes from ``E |H g|^2 = |H|_F^2`` for Gaussian ``g``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from disthess.linalg.operator import AbstractSymmetricOperator


@dataclass(frozen=True, slots=True)
class TraceResult:
    """An estimate of the trace.

    Attributes:
        value: The estimate.
        standard_error: Of the estimate; 0 where it is exact.
        products: Products with the operator.
    """

    value: float
    standard_error: float
    products: int


def estimate_trace(operator: AbstractSymmetricOperator, *, probes: int = 48, seed: int = 0) -> TraceResult:
    """Trace of a symmetric operator from about ``probes`` products.

    A third finds the range, a third gives the trace on it exactly, a third estimates the rest.

    Raises:
        ValueError: Fewer than 6 probes.
    """
    if probes < 6:
        raise ValueError(f"a trace needs at least 6 probes, got {probes}")
    size = operator.size
    third = min(probes // 3, size)
    generator = np.random.default_rng(seed)
    sketch = operator.matmat(generator.choice([-1.0, 1.0], size=(size, third)))
    basis = np.linalg.qr(np.asarray(sketch, dtype=np.float64))[0]
    exact = float(np.einsum("pk,pk->", basis, operator.matmat(basis)))
    signs = generator.choice([-1.0, 1.0], size=(size, third))
    rest = signs - basis @ (basis.T @ signs)
    terms = np.einsum("pk,pk->k", rest, operator.matmat(rest))
    if third >= size:
        return TraceResult(exact, 0.0, 2 * third)
    error = float(terms.std(ddof=1) / np.sqrt(third)) if third > 1 else float("nan")
    return TraceResult(exact + float(terms.mean()), error, 3 * third)


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
