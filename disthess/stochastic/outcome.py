"""Sums and means over evaluations: running moments, Louis's identity, and the errors of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np

GROUPS = 20
"""Of the jackknife."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Loss, gradient and Hessian of one batch, with their standard errors."""

    loss: float
    gradient: np.ndarray
    matrix: np.ndarray
    loss_error: float
    matrix_error: np.ndarray
    count: int
    degrees: int
    quadrature_error: float


def louis(logs: np.ndarray, gradients: np.ndarray, hessians: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """``-log sum_i e^(l_i)`` with its gradient and Hessian, from those of each ``l_i = log p(y, z_i)``.

    ``H = -(E_post hess l + Cov_post grad l)``, the posterior being ``softmax(l)``.

    Args:
        logs: ``[m]``.
        gradients: ``[m, P]``.
        hessians: ``[m, P, P]``.
    """
    top = float(logs.max())
    weights = np.exp(logs - top)
    total = float(weights.sum())
    weights = weights / total
    mean = weights @ gradients
    centred = gradients - mean
    matrix = -(np.tensordot(weights, hessians, axes=1) + (weights[:, None] * centred).T @ centred)
    return -(top + float(np.log(total))), -mean, matrix


def jackknifed(found: Sequence[tuple[float, np.ndarray, np.ndarray, float]]) -> Outcome:
    """Weights ``p(y | z)`` of draws from the prior; errors by leaving out one of twenty groups at a time."""
    gradients, hessians = np.stack([entry[1] for entry in found]), np.stack([entry[2] for entry in found])
    logs = np.array([entry[3] for entry in found])
    groups = np.arange(len(found)) % GROUPS
    whole = louis(logs - np.log(len(logs)), gradients, hessians)
    parts = [
        louis(logs[keep] - np.log(keep.sum()), gradients[keep], hessians[keep])
        for keep in (groups != group for group in range(min(GROUPS, len(found))))
    ]
    count = len(parts)

    def error(place: int) -> Any:
        values = np.stack([np.asarray(part[place]) for part in parts])
        return np.sqrt((count - 1) / count * ((values - values.mean(0)) ** 2).sum(0))

    return Outcome(whole[0], whole[1], whole[2], float(error(0)), error(2), len(found), count - 1, 0.0)


@final
class Moments:
    """Running mean and standard error (Welford)."""

    def __init__(self) -> None:
        self._count = 0
        self._mean: Any = 0.0
        self._squares: Any = 0.0

    def add(self, value: np.ndarray) -> None:
        """One more."""
        self._count += 1
        step = value - self._mean
        self._mean = self._mean + step / self._count
        self._squares = self._squares + step * (value - self._mean)

    @property
    def mean(self) -> Any:
        """Of all."""
        return self._mean

    @property
    def error(self) -> Any:
        """Standard error of the mean; NaN of one value."""
        if self._count < 2:
            return self._mean * np.nan
        return np.sqrt(self._squares / (self._count * (self._count - 1)))
