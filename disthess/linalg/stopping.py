"""When to stop: tests of a point that mean what they say, each a function of numbers that any audit has.

``|g| / |H|`` is none of them: it has the units of the parameters, changes with their scale, and is tiny where one curvature is
large, however far the others are from their minimum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class StoppingReport:
    """The criteria at one point.

    Attributes:
        scaled_gradient: See `scaled_gradient`.
        smallest_eigenvalue: Of the Hessian.
        newton_decrement: ``1/2 g^T (H + shift I)^-1 g``: the decrease that the quadratic model promises.
        shift: Added to make the Hessian positive definite; 0 where it is, and the decrement is then invariant under any change of
            variables.
        first_order: Whether the scaled gradient is within its tolerance.
        second_order: Whether the smallest eigenvalue is at least ``-curvature_tolerance``.
        small_decrease: Whether the decrement is within its tolerance.
    """

    scaled_gradient: float
    smallest_eigenvalue: float
    newton_decrement: float
    shift: float
    first_order: bool
    second_order: bool
    small_decrease: bool

    @property
    def stop(self) -> bool:
        """Whether all hold: a gradient that is small, no direction of descent at second order, no decrease worth a step."""
        return self.first_order and self.second_order and self.small_decrease


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
        scaled,
        smallest,
        decrement,
        shift,
        bool(scaled <= gradient_tolerance),
        is_second_order(smallest, allowed),
        bool(decrement <= decrease_tolerance * max(1.0, abs(loss))),
    )
