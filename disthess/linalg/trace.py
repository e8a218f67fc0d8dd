"""The trace from random vectors, with its standard error: Hutch++ (Meyer, Musco, Musco and Woodruff 2021)."""

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
