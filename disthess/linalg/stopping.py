"""When to stop: tests of a point that mean what they say, each a function of numbers that any audit has.

``|g| / |H|`` is none of them: it has the units of the parameters, changes with their scale, and is tiny where one curvature is
large, however far the others are from their minimum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True, slots=True)
class Criterion:
    """One test: ``value sign allowed``.

    Attributes:
        name: What it is called in tables and audits.
        value: The number.
        sign: ``<=`` or ``>=``.
        allowed: The bound.
    """

    name: str
    value: float
    sign: Literal["<=", ">="]
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether it is met."""
        return bool(self.value <= self.allowed if self.sign == "<=" else self.value >= self.allowed)


@dataclass(frozen=True, slots=True)
class StoppingReport:
    """The criteria at one point.

    Attributes:
        scaled_gradient: See `scaled_gradient`.
        gradient_tolerance: What it may be.
        smallest_eigenvalue: Of the Hessian.
        curvature_tolerance: How negative it may be.
        newton_decrement: ``1/2 g^T (H + shift I)^-1 g``: the decrease that the quadratic model promises.
        decrease_tolerance: What it may be, in the units of L.
        shift: Added to make the Hessian positive definite; 0 where it is, and the decrement is then invariant under any change of
            variables.
    """

    scaled_gradient: float
    gradient_tolerance: float
    smallest_eigenvalue: float
    curvature_tolerance: float
    newton_decrement: float
    decrease_tolerance: float
    shift: float

    def rows(self) -> tuple[Criterion, Criterion, Criterion]:
        """The criteria, first order first."""
        return (
            Criterion("scaled gradient", self.scaled_gradient, "<=", self.gradient_tolerance),
            Criterion("smallest eigenvalue", self.smallest_eigenvalue, ">=", -self.curvature_tolerance),
            Criterion("newton decrement", self.newton_decrement, "<=", self.decrease_tolerance),
        )

    @property
    def first_order(self) -> bool:
        """Whether the gradient is small."""
        return self.rows()[0].holds

    @property
    def second_order(self) -> bool:
        """Whether no direction descends at second order."""
        return self.rows()[1].holds

    @property
    def small_decrease(self) -> bool:
        """Whether the quadratic model promises no decrease worth a step."""
        return self.rows()[2].holds

    @property
    def stop(self) -> bool:
        """Whether all hold."""
        return all(row.holds for row in self.rows())

    def metrics(self) -> dict[str, float]:
        """Numbers by name, as an audit records them; whether a criterion holds is 1 or 0."""
        found = {row.name.replace(" ", "_"): row.value for row in self.rows()}
        return {**found, "shift": self.shift, "stop": float(self.stop)}


def scaled_gradient(gradient: np.ndarray, point: np.ndarray, loss: float, typical: float = 1.0) -> float:
    """``max_i |g_i| max(|theta_i|, typical) / max(|L|, typical)``: the relative change of L for a relative change of theta.

    Args:
        gradient: ``[P]``.
        point: The parameters, ``[P]``.
        loss: ``L``.
        typical: Size below which parameters and loss count as this large.

    Example:
        >>> scaled_gradient(np.array([0.5, 0.0]), np.array([4.0, 1.0]), 2.0)
        1.0
    """
    if len(gradient) == 0:
        return 0.0
    return float((np.abs(gradient) * np.maximum(np.abs(point), typical)).max() / max(abs(loss), typical))


def is_second_order(smallest_eigenvalue: float, tolerance: float) -> bool:
    """``lambda_min(H) >= -tolerance``: no saddle; which says nothing about how far away a minimum is.

    >>> is_second_order(-1.0, 1e-6)
    False
    """
    return bool(smallest_eigenvalue >= -tolerance)


def newton_decrement(eigenvalues: np.ndarray, coefficients: np.ndarray, shift: float = 0.0) -> float:
    """``1/2 g^T (H + shift I)^-1 g`` from the eigenvalues of H and the coefficients of g along its eigenvectors.

    Infinite where the shifted matrix is not positive definite along g.

    >>> newton_decrement(np.array([1e8, 1.0]), np.array([0.0, 1.0]))
    0.5
    """
    used = np.abs(coefficients) > 0
    shifted = eigenvalues + shift
    if (shifted[used] <= 0).any():
        return float("inf")
    # A curvature of 0 is shifted by next to nothing: the model then promises any decrease.
    with np.errstate(over="ignore"):
        return 0.5 * float((coefficients[used] ** 2 / shifted[used]).sum())


def has_stalled(decrease: float, step: np.ndarray, loss: float, point: np.ndarray, tolerance: float) -> bool:
    """Whether loss and parameters have stopped moving, relatively; arrival only together with a small scaled gradient.

    >>> has_stalled(1e-12, np.array([1e-9]), 1.0, np.array([1.0]), 1e-8)
    True
    """
    moved = np.abs(step) / np.maximum(np.abs(point), 1.0)
    return abs(decrease) <= tolerance * max(1.0, abs(loss)) and float(moved.max(initial=0.0)) <= tolerance


def judge(
    eigenvalues: np.ndarray,
    coefficients: np.ndarray,
    gradient: np.ndarray,
    point: np.ndarray,
    loss: float,
    *,
    gradient_tolerance: float = 1e-6,
    curvature_tolerance: float | None = None,
    decrease_tolerance: float = 1e-8,
) -> StoppingReport:
    """All criteria at once.

    Args:
        eigenvalues: Of the Hessian; all, or those of a subspace that holds the gradient.
        coefficients: Of the gradient along the eigenvectors.
        gradient: ``[P]``.
        point: ``[P]``.
        loss: ``L``.
        gradient_tolerance: Of the scaled gradient.
        curvature_tolerance: Of the smallest eigenvalue; default the square root of ``gradient_tolerance``, times the largest
            magnitude of an eigenvalue if that is more than 1.
        decrease_tolerance: Of the decrement, relative to ``max(1, |L|)``.
    """
    scaled = scaled_gradient(gradient, point, loss)
    smallest = float(eigenvalues.min(initial=np.inf))
    magnitude = float(np.abs(eigenvalues).max(initial=0.0))
    allowed = (
        np.sqrt(max(gradient_tolerance, 0.0)) * max(1.0, magnitude)
        if curvature_tolerance is None
        else curvature_tolerance
    )
    floor = 1e-12 * max(magnitude, np.finfo(float).tiny)
    shift = 0.0 if smallest > floor else -smallest + max(floor, 1e-8 * magnitude)
    decrement = newton_decrement(eigenvalues, coefficients, shift)
    return StoppingReport(
        scaled_gradient=scaled,
        gradient_tolerance=gradient_tolerance,
        smallest_eigenvalue=smallest,
        curvature_tolerance=float(allowed),
        newton_decrement=decrement,
        decrease_tolerance=decrease_tolerance * max(1.0, abs(loss)),
        shift=shift,
    )
