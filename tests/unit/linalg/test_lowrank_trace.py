"""Low rank and trace against dense numbers, and operators against SciPy's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse.linalg import LinearOperator, eigsh

from disthess.linalg.lowrank import low_rank
from disthess.linalg.operator import DenseOperator, ScipyOperator, to_scipy
from disthess.linalg.trace import estimate_frobenius, estimate_trace


def random_matrix(values: np.ndarray, seed: int = 0) -> np.ndarray:
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values), len(values))))[0]
    return (basis * values) @ basis.T


def test_a_matrix_of_low_rank_is_found_whole() -> None:
    wanted = np.array([9.0, -6.0, 3.0, -1.0])
    matrix = random_matrix(np.r_[wanted, np.zeros(196)])
    found = low_rank(DenseOperator(matrix), 4)
    np.testing.assert_allclose(found.values, wanted, atol=1e-10)
    np.testing.assert_allclose((found.vectors * found.values) @ found.vectors.T, matrix, atol=1e-10)
    assert found.error < 1e-10
    assert found.relative_error < 1e-10


@pytest.mark.parametrize("seed", range(4))
def test_the_estimated_error_is_the_error(seed: int) -> None:
    matrix = random_matrix(np.random.default_rng(8).normal(size=250) * np.r_[np.full(10, 30.0), np.ones(240)])
    found = low_rank(DenseOperator(matrix), 20, seed=seed, frobenius=float(np.linalg.norm(matrix)))
    true = np.linalg.norm(matrix - (found.vectors * found.values) @ found.vectors.T)
    assert abs(found.error - true) < 4 * found.standard_error
    assert found.standard_error < 0.2 * true
    np.testing.assert_allclose(found.relative_error, found.error / np.linalg.norm(matrix))
    assert (np.diff(np.abs(found.values)) <= 1e-12).all()


def test_a_rank_beyond_the_size_is_the_whole_matrix() -> None:
    matrix = random_matrix(np.arange(6.0) - 2)
    found = low_rank(DenseOperator(matrix), 50)
    assert found.vectors.shape == (6, 6)
    np.testing.assert_allclose((found.vectors * found.values) @ found.vectors.T, matrix, atol=1e-12)


def test_a_zero_matrix_has_no_error() -> None:
    found = low_rank(DenseOperator(np.zeros((30, 30))), 3)
    assert found.error == found.relative_error == found.standard_error == 0
    assert not found.values.any()


@pytest.mark.parametrize("seed", range(5))
def test_traces_lie_within_their_error(seed: int) -> None:
    matrix = random_matrix(np.random.default_rng(4).normal(loc=0.3, size=300) * np.r_[np.full(6, 40.0), np.ones(294)])
    found = estimate_trace(DenseOperator(matrix), seed=seed)
    assert abs(found.value - np.trace(matrix)) < 4 * found.standard_error
    assert found.standard_error < 30


def test_a_trace_is_exact_where_the_range_holds_all() -> None:
    matrix = random_matrix(np.arange(10.0))
    small = estimate_trace(DenseOperator(matrix))
    np.testing.assert_allclose(small.value, 45.0)
    assert small.standard_error == 0
    low = estimate_trace(DenseOperator(random_matrix(np.r_[5.0, -2.0, np.zeros(200)])))
    np.testing.assert_allclose(low.value, 3.0, atol=1e-9)
    with pytest.raises(ValueError, match="at least 6"):
        estimate_trace(DenseOperator(matrix), probes=5)


@pytest.mark.parametrize("seed", range(5))
def test_frobenius_norms_lie_within_their_error(seed: int) -> None:
    matrix = random_matrix(np.random.default_rng(4).normal(size=300))
    found = estimate_frobenius(DenseOperator(matrix), seed=seed)
    assert abs(found.value - np.linalg.norm(matrix)) < 4 * found.standard_error
    assert 0 < found.standard_error < 0.1 * np.linalg.norm(matrix)
    assert estimate_frobenius(DenseOperator(np.zeros((4, 4)))).value == 0


def test_operators_go_to_scipy_and_back() -> None:
    matrix = random_matrix(np.linspace(-1, 4, 60))
    there = to_scipy(DenseOperator(matrix))
    block = np.random.default_rng(0).normal(size=(60, 3))
    np.testing.assert_array_equal(there.matmat(block), matrix @ block)
    np.testing.assert_allclose(there.matvec(block[:, 0]), matrix @ block[:, 0], atol=1e-14)
    np.testing.assert_allclose(there.rmatvec(block[:, 0]), matrix.T @ block[:, 0], atol=1e-14)
    np.testing.assert_allclose(eigsh(there, k=1, which="LA", v0=np.ones(60))[0], [4.0])
    np.testing.assert_array_equal(ScipyOperator(there).matmat(block), matrix @ block)


def test_operators_must_be_square() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        DenseOperator(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        ScipyOperator(LinearOperator((2, 3), matvec=lambda v: np.zeros(2), dtype=np.float64))
