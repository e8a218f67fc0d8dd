"""A quadratic model ``g^T s + 1/2 s^T H s`` in the eigenvectors of H, whole or on a Krylov space, and the steps it proposes.

On the Krylov space of g every step below is found exactly, as from the whole matrix once the space is large enough; how far it
still is from that is the residual ``|(H + shift) s + g|``, which is known.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from disthess.linalg.operator import AbstractSymmetricOperator


@dataclass(frozen=True, slots=True)
class QuadraticModel:
    """Curvature and gradient at a point.

    Attributes:
        eigenvalues: Ascending, ``[m]``.
        vectors: Orthonormal, ``[P, m]``.
        coefficients: Of the gradient along them, ``[m]``.
        complete: Whether these are all eigenpairs, not those of a subspace.
        products: Products with H that were needed.
        edge: Norm of what H carries out of the subspace from its last basis vector, and that vector's coefficients, ``[m]``; zeros
            for a complete one.
    """

    eigenvalues: np.ndarray
    vectors: np.ndarray
    coefficients: np.ndarray
    complete: bool
    products: int
    edge: np.ndarray

    @property
    def smallest(self) -> float:
        """Smallest eigenvalue (of the subspace: an upper bound of the true one)."""
        return float(self.eigenvalues[0])

    def newton(self, shift: float) -> np.ndarray:
        """``-(H + shift I)^-1 g`` in the eigenvectors.

        Raises:
            ZeroDivisionError: The shifted matrix is singular.
        """
        shifted = self.eigenvalues + shift
        if (np.abs(shifted) <= 1e-14 * max(float(np.abs(self.eigenvalues).max()), abs(shift), 1e-300)).any():
            raise ZeroDivisionError("singular")
        return -self.coefficients / shifted

    def cubic(self, weight: float) -> tuple[np.ndarray, float]:
        """Minimiser of ``g s + 1/2 s H s + weight/6 |s|^3`` and its shift ``weight/2 |s|``, the Hessian shifted positive."""
        lowest = max(0.0, -self.smallest)
        scale = max(float(np.abs(self.eigenvalues).max()), 1e-300)

        def gap(shift: float) -> float:
            return 0.5 * weight * float(np.linalg.norm(self.coefficients / (self.eigenvalues + shift))) - shift

        start = lowest + 1e-13 * scale
        if gap(start) <= 0:
            # Hard case: the gradient has nothing along the lowest eigenvector, which makes up the length.
            step = -np.where(self.eigenvalues + lowest > 1e-12 * scale, self.coefficients, 0.0)
            step = step / np.maximum(self.eigenvalues + lowest, 1e-12 * scale)
            missing = max(0.0, (2 * lowest / weight) ** 2 - float(step @ step))
            step[0] += np.sqrt(missing)
            return step, lowest
        end = start + scale
        while gap(end) > 0:
            end *= 2
        shift = float(brentq(gap, start, end, xtol=1e-15 * end, rtol=8.9e-16, maxiter=500))
        return -self.coefficients / (self.eigenvalues + shift), shift

    def change(self, step: np.ndarray) -> float:
        """``g s + 1/2 s H s``."""
        return float(self.coefficients @ step + 0.5 * (self.eigenvalues * step**2).sum())

    def residual(self, step: np.ndarray) -> float:
        """What of the step's equation the subspace leaves unsolved."""
        return abs(float(self.edge @ step))


def complete_model(matrix: np.ndarray, gradient: np.ndarray) -> QuadraticModel:
    """From the whole matrix, by its eigendecomposition."""
    values, vectors = np.linalg.eigh(0.5 * (matrix + matrix.T))
    return QuadraticModel(values, vectors, vectors.T @ gradient, True, len(matrix), np.zeros(len(values)))


def krylov_model(
    operator: AbstractSymmetricOperator,
    gradient: np.ndarray,
    *,
    size: int = 200,
    tolerance: float = 1e-10,
    shift: float = 0.0,
) -> QuadraticModel:
    """From the Krylov space of the gradient, by Lanczos with full reorthogonalisation.

    Args:
        operator: ``H``.
        gradient: ``[P]``, not zero.
        size: Most products.
        tolerance: Residual of the shifted Newton step, relative to the gradient, at which the space is large enough.
        shift: Of that step.
    """
    length = float(np.linalg.norm(gradient))
    basis = [gradient / length]
    alphas: list[float] = []
    betas: list[float] = []
    for _ in range(min(size, len(gradient))):
        image = np.asarray(operator.matmat(basis[-1][:, None]), dtype=np.float64)[:, 0]
        alphas.append(float(basis[-1] @ image))
        held = np.stack(basis, axis=1)
        for _ in range(2):
            image = image - held @ (held.T @ image)
        betas.append(float(np.linalg.norm(image)))
        small = np.diag(alphas) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1)
        values, inner = np.linalg.eigh(small)
        model = QuadraticModel(
            values, held @ inner, length * inner[0], len(basis) == len(gradient), len(alphas), betas[-1] * inner[-1]
        )
        exhausted = betas[-1] <= 1e-13 * max(float(np.abs(values).max()), 1e-300)
        shifted = values + shift
        safe = np.where(np.abs(shifted) > 1e-300, shifted, 1e-300)
        if exhausted or model.residual(-model.coefficients / safe) <= tolerance * length:
            break
        basis.append(image / betas[-1])
    return model
