"""Time that passes only when something says so, and operators whose products take some of it."""

from __future__ import annotations

import abc

import numpy as np

from disthess.linalg.operator import AbstractSymmetricOperator


class Clock:
    """Seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class TimedOperator(AbstractSymmetricOperator):
    """A matrix whose products take time.

    Args:
        matrix: The matrix.
        clock: Put forward by each block of products.
    """

    def __init__(self, matrix: np.ndarray, clock: Clock) -> None:
        self.matrix, self.clock = matrix, clock

    @abc.abstractmethod
    def seconds(self, count: int) -> float:
        """What so many products take now."""

    @property
    def size(self) -> int:
        return len(self.matrix)

    @property
    def dtype(self) -> np.dtype:
        return self.matrix.dtype

    def matmat(self, block: np.ndarray) -> np.ndarray:
        self.clock.now += self.seconds(block.shape[1])
        return self.matrix @ block


def spectrum(kind: str, size: int) -> np.ndarray:
    """A symmetric matrix with eigenvalues by a power law, with outliers, or flat."""
    random = np.random.default_rng(0)
    axes = np.linalg.qr(random.standard_normal((size, size)))[0]
    values = {
        "power law": np.arange(1, size + 1.0) ** -1.0,
        "outliers": np.concatenate([[-3.0, 30.0, 20.0], 0.1 * random.standard_normal(size - 3)]),
        "flat": random.uniform(-1.0, 1.0, size),
    }[kind]
    return axes * values @ axes.T
