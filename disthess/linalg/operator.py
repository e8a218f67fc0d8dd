"""A symmetric operator: anything that multiplies blocks of vectors. Every algorithm here asks for no more."""

from __future__ import annotations

import abc
from typing import final

import numpy as np
from scipy.sparse.linalg import LinearOperator
from typing_extensions import override


class AbstractSymmetricOperator(abc.ABC):
    """A real symmetric ``[P, P]`` matrix known by its products."""

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """``P``."""

    @property
    @abc.abstractmethod
    def dtype(self) -> np.dtype:
        """Dtype of its entries."""

    @abc.abstractmethod
    def matmat(self, block: np.ndarray) -> np.ndarray:
        """``H X``: ``[P, k]`` from ``[P, k]``."""


@final
class DenseOperator(AbstractSymmetricOperator):
    """A matrix in memory.

    Args:
        matrix: ``[P, P]``, symmetric.

    Raises:
        ValueError: It is not square.

    Example:
        >>> DenseOperator(np.diag([1.0, 2.0])).matmat(np.ones((2, 1))).ravel().tolist()
        [1.0, 2.0]
    """

    def __init__(self, matrix: np.ndarray) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"a symmetric operator needs a square matrix, got shape {matrix.shape}")
        self._matrix = matrix

    @property
    @override
    def size(self) -> int:
        return int(self._matrix.shape[0])

    @property
    @override
    def dtype(self) -> np.dtype:
        return self._matrix.dtype

    @override
    def matmat(self, block: np.ndarray) -> np.ndarray:
        return self._matrix @ block


@final
class ScipyOperator(AbstractSymmetricOperator):
    """A SciPy ``LinearOperator`` that is symmetric.

    Raises:
        ValueError: It is not square.
    """

    def __init__(self, operator: LinearOperator) -> None:
        if operator.shape[0] != operator.shape[1]:
            raise ValueError(f"a symmetric operator must be square, got shape {operator.shape}")
        self._operator = operator

    @property
    @override
    def size(self) -> int:
        return int(self._operator.shape[0])

    @property
    @override
    def dtype(self) -> np.dtype:
        return np.dtype(self._operator.dtype or np.float64)

    @override
    def matmat(self, block: np.ndarray) -> np.ndarray:
        return np.asarray(self._operator.matmat(block))


def to_scipy(operator: AbstractSymmetricOperator) -> LinearOperator:
    """The same operator for SciPy's solvers."""

    def column(vector: np.ndarray) -> np.ndarray:
        return operator.matmat(vector.reshape(-1, 1)).ravel()

    return LinearOperator(
        (operator.size, operator.size),
        matvec=column,
        rmatvec=column,
        matmat=operator.matmat,
        rmatmat=operator.matmat,
        dtype=operator.dtype,
    )
