"""Low rank and trace against dense numbers, and operators against SciPy's."""

from __future__ import annotations

from typing import final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, eigsh
from typing_extensions import override

from disthess.linalg.lowrank import LowRankResult, Method, low_rank
from disthess.linalg.operator import AbstractSymmetricOperator, DenseOperator, ScipyOperator, to_scipy
from disthess.linalg.solve import solve_low_rank
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


def form(found: LowRankResult) -> np.ndarray:
    return (found.vectors * found.values) @ found.vectors.T


@pytest.mark.parametrize("method", ["randomised", "nystrom"])
@pytest.mark.parametrize("seed", range(4))
def test_the_estimated_error_is_the_error(seed: int, method: Method) -> None:
    matrix = random_matrix(np.random.default_rng(8).normal(size=250) * np.r_[np.full(10, 30.0), np.ones(240)])
    found = low_rank(DenseOperator(matrix), 20, method=method, seed=seed)
    true = np.linalg.norm(matrix - form(found))
    assert abs(found.error - true) < 4 * found.standard_error
    assert found.standard_error < 0.2 * true
    assert (np.diff(np.abs(found.values)) <= 1e-12).all()


def test_with_the_norm_known_the_error_is() -> None:
    matrix = random_matrix(np.random.default_rng(8).normal(size=250) * np.r_[np.full(10, 30.0), np.ones(240)])
    whole = float(np.linalg.norm(matrix))
    found = low_rank(DenseOperator(matrix), 20, frobenius=whole)
    assert found.error == pytest.approx(np.linalg.norm(matrix - form(found)), rel=1e-9)
    assert found.standard_error == 0
    assert found.relative_error == pytest.approx(found.error / whole)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["randomised", "exact", "nystrom"]),
    st.integers(1, 60),
    st.integers(1, 25),
    st.floats(0.02, 3.0),
    st.booleans(),
    st.integers(0, 100_000),
)
def test_bounds_hold_in_every_trial(method: Method, size: int, rank: int, decay: float, known: bool, seed: int) -> None:
    """Frobenius and spectral norm of the error, no eigenvalue moved by more, and no form better than the exact one."""
    values = np.random.default_rng(seed).standard_normal(size) * np.exp(-decay * np.arange(size))
    matrix = random_matrix(values, seed)
    whole = float(np.linalg.norm(matrix))
    found = low_rank(DenseOperator(matrix), rank, method=method, seed=seed, frobenius=whole if known else None)
    left = matrix - form(found)
    rounding = 1e-13 * whole
    assert np.linalg.norm(left) <= found.frobenius_bound + rounding
    assert np.linalg.norm(left, 2) <= found.spectral_bound + rounding
    moved = np.abs(np.linalg.eigvalsh(matrix) - np.linalg.eigvalsh(form(found))).max()
    assert moved <= found.spectral_bound + rounding
    np.testing.assert_allclose(found.vectors.T @ found.vectors, np.eye(len(found.values)), atol=1e-10)
    rest = np.sort(np.abs(values))[::-1][rank:]
    assert np.linalg.norm(left) >= np.linalg.norm(rest) - rounding
    if method == "exact":
        assert np.linalg.norm(left) == pytest.approx(np.linalg.norm(rest), abs=rounding)
        assert np.linalg.norm(left, 2) == pytest.approx(rest.max(initial=0.0), abs=rounding)
    np.testing.assert_allclose(found.apply(np.ones(size)), form(found) @ np.ones(size), atol=1e-12 * (1 + whole))


def test_exact_pairs_of_a_large_matrix() -> None:
    values = np.r_[50.0, -49.0, 20.0, -7.0, np.linspace(-3, 3, 700)]
    matrix = random_matrix(values)
    found = low_rank(DenseOperator(matrix), 4, method="exact", frobenius=float(np.linalg.norm(values)))
    np.testing.assert_allclose(found.values, [50.0, -49.0, 20.0, -7.0], atol=1e-8)
    assert found.error == pytest.approx(np.linalg.norm(values[4:]), rel=1e-9)
    assert 3.0 <= found.spectral_bound < 3.0 + 1e-4


def test_the_expected_error_of_the_range_finder() -> None:
    """Without power iterations, over seeds: at most (1 + r / (p - 1))^1/2 times the best error of that rank."""
    values = 1.0 / np.arange(1, 201) ** 2
    matrix, rank, oversample = random_matrix(values), 8, 4
    errors = []
    for seed in range(40):
        width = np.random.default_rng(seed).standard_normal((200, rank + oversample))
        basis = np.linalg.qr(matrix @ width)[0]
        errors.append(np.linalg.norm(matrix - basis @ (basis.T @ matrix)))
        found = low_rank(DenseOperator(matrix), rank + oversample, oversample=0, power=0, seed=seed)
        assert np.linalg.norm(matrix - form(found)) <= 2 * errors[-1]  # Q Q^T H Q Q^T in place of Q Q^T H
    assert np.mean(errors) <= np.sqrt(1 + rank / (oversample - 1)) * np.linalg.norm(values[rank:])


@final
class Passes(AbstractSymmetricOperator):
    """Counts how often a matrix is read."""

    def __init__(self, matrix: np.ndarray) -> None:
        self.matrix, self.count = matrix, 0

    @property
    @override
    def size(self) -> int:
        return len(self.matrix)

    @property
    @override
    def dtype(self) -> np.dtype:
        return self.matrix.dtype

    @override
    def matmat(self, block: np.ndarray) -> np.ndarray:
        self.count += 1
        return self.matrix @ block


def test_nystroem_reads_the_matrix_once() -> None:
    values = np.r_[np.linspace(1, 2, 12), np.full(188, 1e-3)]
    operator = Passes(random_matrix(values))
    found = low_rank(operator, 12, method="nystrom")
    assert operator.count == 1
    assert np.linalg.norm(operator.matrix - form(found)) < 3 * np.linalg.norm(values[12:])


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.integers(1, 10), st.integers(0, 100_000), st.floats(0.01, 10.0))
def test_a_solution_of_the_form_is_within_its_bound(size: int, rank: int, seed: int, damping: float) -> None:
    """|(H + m)^-1 b - (H_r + m)^-1 b| <= |E|_2 |b| / (m m'), where it is promised at all."""
    values = np.random.default_rng(seed).standard_normal(size) * np.exp(-0.5 * np.arange(size))
    matrix, right = random_matrix(values, seed), np.random.default_rng(seed + 1).standard_normal(size)
    found = low_rank(DenseOperator(matrix), rank, method="exact")
    try:
        solved = solve_low_rank(found, right, damping)
    except ValueError:
        return
    rest = np.sort(np.abs(values))[::-1][rank:].max(initial=0.0)
    if solved.error_bound is None:
        assert damping + min(0.0, float(found.values.min())) <= rest * (1 + 1e-9) + 1e-12
        return
    wanted = np.linalg.solve(matrix + damping * np.eye(size), right)
    assert np.linalg.norm(solved.solution - wanted) <= solved.error_bound * (1 + 1e-9) + 1e-11 * np.linalg.norm(wanted)


def test_wrong_wishes_are_refused() -> None:
    operator = DenseOperator(np.eye(5))
    for options in ({"rank": 0}, {"rank": 2, "method": "best"}, {"rank": 2, "power": -1}):
        with pytest.raises(ValueError, match="must be"):
            low_rank(operator, **options)  # type: ignore[arg-type]


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
