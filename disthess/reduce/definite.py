"""Is the generalised Gauss-Newton matrix positive semi-definite, as it must be where the loss is convex in the outputs?

Meant for the true one, ``J^T (nabla^2 loss) J``. The products ``D_v^T H_vv D_v`` of single nodes, with ``H_vv`` the full curvature
of an activation, are indefinite in general and say nothing.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np

from disthess.linalg.lanczos import extreme_eigenpairs
from disthess.linalg.operator import AbstractSymmetricOperator
from disthess.reduce.hessian_store import HessianStore, check_store
from disthess.reduce.keep import keep, kept
from disthess.types import Part

Verdict = Literal["positive semi-definite", "indefinite", "undecided"]

DENSE_SIZE = 1500
"""Matrices up to this size are diagonalised whole."""

ROUNDING = 16.0
"""Multiples of ``eps sqrt(P) |lambda|_max`` that rounding may move an eigenvalue by: each entry is a sum rounded to eps, and
``P x P`` independent errors of that size have a spectral norm of about ``2 sqrt(P)`` of one."""


@dataclass(frozen=True, slots=True)
class Definiteness:
    """What was found.

    Attributes:
        part: Whose matrix.
        smallest: Smallest eigenvalue.
        largest: Largest eigenvalue.
        residual: ``|H v - lambda v|`` of the smallest; 0 where the whole matrix was diagonalised.
        tolerance: How far below zero rounding alone may put an eigenvalue.
        verdict: ``positive semi-definite`` if ``smallest >= -tolerance``, ``indefinite`` if ``smallest + residual < -tolerance``.
    """

    part: str
    smallest: float
    largest: float
    residual: float
    tolerance: float
    verdict: Verdict


def psd_check(store: HessianStore, part: Part = "ggn", seed: int = 0) -> Definiteness:
    """Smallest eigenvalue of a store's part, and what it says.

    Args:
        store: With that part.
        part: Usually ``ggn``.
        seed: Of Lanczos's start vectors.

    Returns:
        The verdict; kept in the store as ``psd/{part}``.

    Raises:
        ConfigError: It is no store.
        StoreError: The part is not stored, or the store is not complete.
    """
    check_store(store)
    settings = {"part": part, "seed": seed}
    old = kept(store, f"psd/{part}", settings)
    if old is not None:
        return Definiteness(**{field.name: old[1][field.name] for field in dataclasses.fields(Definiteness)})
    found = check_definite(store.symmetric_operator(part), part, store.layout.dtype, seed)
    keep(store, f"psd/{part}", settings, {}, dataclasses.asdict(found))
    return found


def check_definite(operator: AbstractSymmetricOperator, part: str, dtype: str, seed: int) -> Definiteness:
    """The same of any symmetric operator whose entries were rounded to ``dtype``."""
    size = operator.size
    if size <= DENSE_SIZE:
        values = np.linalg.eigvalsh(operator.matmat(np.eye(size)))
        smallest, largest, residual = float(values[0]), float(values[-1]), 0.0
    else:
        pairs = extreme_eigenpairs(operator, 1, which="both", seed=seed)
        low, high = int(np.argmin(pairs.values)), int(np.argmax(pairs.values))
        smallest, largest = float(pairs.values[low]), float(pairs.values[high])
        residual = float(pairs.residuals[low])
    tolerance = ROUNDING * float(np.finfo(dtype).eps) * size**0.5 * max(abs(smallest), abs(largest))
    return Definiteness(part, smallest, largest, residual, tolerance, _verdict(smallest, residual, tolerance))


def _verdict(smallest: float, residual: float, tolerance: float) -> Verdict:
    if smallest >= -tolerance:
        return "positive semi-definite"
    # There is an eigenvalue within the residual of the one found.
    return "indefinite" if smallest + residual < -tolerance else "undecided"
