"""The memory bound of Lanczos, and that results do not suffer from it."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from disthess.linalg.density import spectral_density
from disthess.linalg.lanczos import BLOCK, MAX_BASIS, basis_bytes, basis_columns, extreme_eigenpairs
from disthess.linalg.operator import AbstractSymmetricOperator


class Laplacian(AbstractSymmetricOperator):
    """``2 I`` less both neighbours; eigenvalues ``2 - 2 cos(pi j / (P + 1))``, slow to converge."""

    def __init__(self, size: int, scale: float = 1.0) -> None:
        self._size = size
        self.scale = scale
        self.blocks: list[int] = []

    @property
    def size(self) -> int:
        return self._size

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float64)

    def matmat(self, block: np.ndarray) -> np.ndarray:
        self.blocks.append(block.shape[1])
        moved = 2 * block
        moved[1:] -= block[:-1]
        moved[:-1] -= block[1:]
        return self.scale * moved


def test_columns_are_bounded_and_enough_for_restarts() -> None:
    assert basis_columns(10**6, 10) == MAX_BASIS
    assert basis_columns(10**6, 10, memory_bytes=0) == 4 * 20 + 4 * BLOCK
    assert basis_columns(10**6, 10, "largest", 0) == 4 * 10 + 4 * BLOCK
    assert basis_columns(700, 200) == 700
    assert basis_bytes(5000, 3, memory_bytes=16 * 5000 * 100) == 16 * 5000 * 100


def test_memory_stays_within_the_bound_over_many_restarts() -> None:
    size, k = 6000, 4
    bound = basis_bytes(size, k, "largest", 0)
    operator = Laplacian(size)
    tracemalloc.start()
    found = extreme_eigenpairs(operator, k, which="largest", tolerance=1e-4, memory_bytes=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.converged.all()
    assert found.products > 4 * bound // (16 * size)
    # A few blocks come on top.
    assert peak < bound + 8 * (k + 4 * BLOCK) * size * 2


@pytest.mark.slow
def test_a_small_basis_finds_the_same_values() -> None:
    size = 900
    wanted = 2 - 2 * np.cos(np.pi * np.arange(1, size + 1) / (size + 1))
    for memory in (0, None):
        found = extreme_eigenpairs(Laplacian(size), 3, tolerance=1e-7, memory_bytes=memory)
        np.testing.assert_allclose(found.values, wanted[[0, 1, 2, -3, -2, -1]], atol=1e-6)


@pytest.mark.parametrize("probes", [3, 8])
def test_all_probes_are_multiplied_at_once(probes: int) -> None:
    operator = Laplacian(500)
    spectral_density(operator, probes=probes, steps=7)
    assert operator.blocks == [probes] * 7
