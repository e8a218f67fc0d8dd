"""A principal sub-block of a symmetric operator, by its products alone."""

from __future__ import annotations

from typing import final

import numpy as np
from typing_extensions import override

from disthess.linalg.block_map import Places
from disthess.linalg.operator import AbstractSymmetricOperator


@final
class RestrictedOperator(AbstractSymmetricOperator):
    """``E^T H E`` for the columns E of the identity at some places: pad with zeros, multiply, take those entries.

    A product with it costs one with H, and is exact.

    Args:
        inner: ``H``, ``[P, P]``.
        indices: Places of the entries, each once: a slice, or whole numbers ``[n]`` within 0 and P.

    Raises:
        ValueError: No place, one outside the operator, or one given twice.

    Example:
        >>> from disthess.linalg.operator import DenseOperator
        >>> whole = DenseOperator(np.arange(9.0).reshape(3, 3))
        >>> RestrictedOperator(whole, np.array([0, 2])).matmat(np.eye(2)).tolist()
        [[0.0, 2.0], [6.0, 8.0]]
    """

    def __init__(self, inner: AbstractSymmetricOperator, indices: Places) -> None:
        places = np.arange(inner.size)[indices] if isinstance(indices, slice) else np.asarray(indices)
        if places.ndim != 1 or places.size == 0 or places.min() < 0 or places.max() >= inner.size:
            raise ValueError(f"a block needs places from 0 to {inner.size - 1}, at least one of them")
        member = np.zeros(inner.size, dtype=bool)
        member[places] = True
        if np.count_nonzero(member) != len(places):
            raise ValueError("a block must name each of its places once")
        self._inner = inner
        self._indices = indices
        self._size = len(places)

    @property
    @override
    def size(self) -> int:
        return self._size

    @property
    @override
    def dtype(self) -> np.dtype:
        return self._inner.dtype

    @override
    def matmat(self, block: np.ndarray) -> np.ndarray:
        # Fortran order: vectors lie together, as the operators want them.
        padded = np.zeros((self._inner.size, block.shape[1]), dtype=block.dtype, order="F")
        padded[self._indices] = block
        return np.ascontiguousarray(np.asarray(self._inner.matmat(padded))[self._indices])
