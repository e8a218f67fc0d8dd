"""Extreme eigenpairs against dense eigenvalues; 700 rows and more take the iterative path."""

from __future__ import annotations

import numpy as np
import pytest

from disthess.linalg.lanczos import DENSE_SIZE, Which, extreme_eigenpairs
from disthess.linalg.operator import AbstractSymmetricOperator, DenseOperator

LARGE = DENSE_SIZE + 100


def matrix_of(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """A dense symmetric matrix with these eigenvalues."""
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values), len(values))))[0]
    return (basis * values) @ basis.T


class Diagonal(AbstractSymmetricOperator):
    """A diagonal matrix that counts the columns it was multiplied with."""

    def __init__(self, entries: np.ndarray) -> None:
        self.entries = entries
        self.columns = 0

    @property
    def size(self) -> int:
        return len(self.entries)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float64)

    def matmat(self, block: np.ndarray) -> np.ndarray:
        self.columns += block.shape[1]
        return self.entries[:, None] * block


def spectrum_like_a_hessian(size: int) -> np.ndarray:
    """A few large outliers on both sides of a bulk that crowds at zero."""
    bulk = np.random.default_rng(5).normal(scale=1e-2, size=size - 12)
    return np.sort(np.concatenate([bulk, [40.0, 22.0, 13.0, 7.0, 4.0, 2.0, 1.0], [-3.0, -1.0, -0.6, -0.3, -0.2]]))


@pytest.mark.parametrize("size", [40, LARGE])
@pytest.mark.parametrize(
    ("which", "places"),
    [("both", [0, 1, 2, 3, -4, -3, -2, -1]), ("largest", [-4, -3, -2, -1]), ("smallest", [0, 1, 2, 3])],
)
def test_values_equal_those_of_the_dense_matrix(size: int, which: Which, places: list[int]) -> None:
    wanted = spectrum_like_a_hessian(size)
    matrix = matrix_of(wanted)
    found = extreme_eigenpairs(DenseOperator(matrix), 4, which=which, vectors=True)
    np.testing.assert_allclose(found.values, wanted[places], atol=1e-9)
    assert found.converged.all()
    assert found.vectors is not None
    np.testing.assert_allclose(found.vectors.T @ found.vectors, np.eye(len(places)), atol=1e-9)
    image = matrix @ found.vectors
    np.testing.assert_allclose(
        found.residuals, np.linalg.norm(image - found.vectors * found.values, axis=0), atol=1e-12
    )


def test_repeated_eigenvalues_are_found_as_often_as_they_occur() -> None:
    wanted = np.concatenate([np.full(5, 3.0), np.full(3, -2.0), np.linspace(-1, 1, LARGE - 8)])
    found = extreme_eigenpairs(DenseOperator(matrix_of(wanted)), 5)
    np.testing.assert_allclose(found.values[-5:], 3.0, atol=1e-8)
    np.testing.assert_allclose(found.values[:3], -2.0, atol=1e-8)
    assert (found.values[3:5] >= -1 - 1e-8).all()


@pytest.mark.parametrize("size", [1, 2, 30, LARGE])
def test_a_zero_matrix_has_zero_eigenvalues(size: int) -> None:
    found = extreme_eigenpairs(Diagonal(np.zeros(size)), 3)
    assert len(found.values) == min(6, size)
    assert not found.values.any()
    assert found.converged.all()


@pytest.mark.parametrize("k", [3, 5, 12])
def test_no_eigenvalue_is_given_twice_where_both_ends_meet(k: int) -> None:
    wanted = np.arange(5.0) - 2
    found = extreme_eigenpairs(DenseOperator(np.diag(wanted)), k)
    np.testing.assert_allclose(found.values, wanted if k >= 3 else wanted[[0, -1]], atol=1e-12)


def test_one_by_one() -> None:
    found = extreme_eigenpairs(DenseOperator(np.array([[-4.0]])), 10, vectors=True)
    np.testing.assert_allclose(found.values, [-4.0])
    assert found.vectors is not None
    assert found.vectors.shape == (1, 1)


def test_a_spectrum_that_needs_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disthess.linalg.lanczos.MAX_BASIS", 64)
    operator = Diagonal(np.linspace(0, 1, 1500) ** 0.5)
    found = extreme_eigenpairs(operator, 2, which="largest", tolerance=1e-5)
    assert found.products > 3 * 64
    np.testing.assert_allclose(found.values, operator.entries[-2:], atol=1e-5)
    assert found.converged.all()


def test_every_product_is_counted() -> None:
    for size in (30, LARGE):
        operator = Diagonal(np.linspace(-1, 2, size) ** 3)
        assert extreme_eigenpairs(operator, 3).products == operator.columns


def test_what_has_not_converged_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disthess.linalg.lanczos.MAX_PRODUCTS", 24)
    found = extreme_eigenpairs(Diagonal(np.linspace(-1, 1, 2000)), 4)
    assert len(found.values) == 8
    assert not found.converged.all()
    assert (found.residuals[~found.converged] > 1e-9).all()


def test_the_same_seed_gives_the_same_bits() -> None:
    matrix = matrix_of(spectrum_like_a_hessian(LARGE))
    first, second = (extreme_eigenpairs(DenseOperator(matrix), 3, seed=7, vectors=True) for _ in range(2))
    assert first.values.tobytes() == second.values.tobytes()
    assert first.vectors is not None
    assert second.vectors is not None
    assert first.vectors.tobytes() == second.vectors.tobytes()


def test_bad_arguments_are_refused() -> None:
    operator = DenseOperator(np.eye(3))
    with pytest.raises(ValueError, match="k must be at least 1"):
        extreme_eigenpairs(operator, 0)
    with pytest.raises(ValueError, match="both, largest or smallest"):
        extreme_eigenpairs(operator, 1, which="middle")  # type: ignore[arg-type]
