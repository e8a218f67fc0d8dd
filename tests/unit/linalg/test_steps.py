"""Solves, quadratic models and stopping criteria against NumPy's dense solutions and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disthess.linalg.lowrank import low_rank
from disthess.linalg.model import complete_model, krylov_model
from disthess.linalg.operator import DenseOperator
from disthess.linalg.solve import solve_dense, solve_iterative, solve_low_rank
from disthess.linalg.stopping import has_stalled, is_second_order, judge, newton_decrement, scaled_gradient


def symmetric(size: int, seed: int, values: np.ndarray | None = None) -> np.ndarray:
    generator = np.random.default_rng(seed)
    basis = np.linalg.qr(generator.standard_normal((size, size)))[0]
    chosen = generator.standard_normal(size) if values is None else values
    return (basis * chosen) @ basis.T


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("how", [solve_dense, lambda m, b, d: solve_iterative(DenseOperator(m), b, d)])
def test_solves(positive, how) -> None:  # type: ignore[no-untyped-def]
    values = np.linspace(0.5 if positive else -1.5, 4.0, 40)
    matrix, right = symmetric(40, 1, values), np.random.default_rng(2).standard_normal(40)
    found = how(matrix, right, 0.2)
    wanted = np.linalg.solve(matrix + 0.2 * np.eye(40), right)
    np.testing.assert_allclose(found.solution, wanted, rtol=1e-6, atol=1e-8)
    assert found.converged
    if positive:
        assert found.smallest_eigenvalue is None
    else:
        assert found.smallest_eigenvalue == pytest.approx(-1.5, abs=1e-6)
        direction = found.negative_direction
        assert direction @ matrix @ direction == pytest.approx(-1.5, abs=1e-5)


def test_an_iteration_is_as_good_beside_large_eigenvalues() -> None:
    """SciPy's rule alone would stop far off, where |H| |x| dwarfs |b|."""
    values = np.concatenate([[1e6, -3e5], np.linspace(0.01, 1.0, 60)])
    matrix, right = symmetric(62, 5, values), np.random.default_rng(6).standard_normal(62)
    found = solve_iterative(DenseOperator(matrix), right, 0.5)
    wanted = np.linalg.solve(matrix + 0.5 * np.eye(62), right)
    assert found.converged
    assert np.linalg.norm(found.solution - wanted) <= 1e-7 * np.linalg.norm(wanted)


def test_a_singular_matrix_is_refused() -> None:
    matrix = symmetric(10, 0, np.array([0.0, *np.linspace(1, 2, 9)]))
    with pytest.raises(ValueError, match="singular"):
        solve_dense(matrix, np.ones(10), 0.0)


def test_solving_on_the_low_rank_form() -> None:
    matrix = symmetric(30, 3, np.concatenate([[5.0, -3.0, 2.0], np.zeros(27)]))
    low = low_rank(DenseOperator(matrix), 3)
    right = np.random.default_rng(4).standard_normal(30)
    found = solve_low_rank(low, right, 0.7)
    np.testing.assert_allclose(found.solution, np.linalg.solve(matrix + 0.7 * np.eye(30), right), rtol=1e-9)
    assert found.smallest_eigenvalue == pytest.approx(-3.0)
    with pytest.raises(ValueError, match="singular"):
        solve_low_rank(low, right, 0.0)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(0, 10_000))
def test_a_krylov_space_gives_the_steps_of_the_whole_matrix(size: int, seed: int) -> None:
    matrix = symmetric(size, seed)
    gradient = np.random.default_rng(seed + 1).standard_normal(size)
    whole, free = complete_model(matrix, gradient), krylov_model(DenseOperator(matrix), gradient, tolerance=0)
    shift = 0.5 - min(whole.smallest, 0)
    wanted = np.linalg.solve(matrix + shift * np.eye(size), -gradient)
    for model in (whole, free):
        np.testing.assert_allclose(model.vectors @ model.newton(shift), wanted, atol=1e-7 * (1 + np.abs(wanted).max()))
        step, used = model.cubic(2.0)
        full = model.vectors @ step
        # Optimality: (H + M/2 |s|) s = -g with a positive semi-definite matrix.
        assert used == pytest.approx(np.linalg.norm(full), rel=1e-6)
        np.testing.assert_allclose(
            (matrix + used * np.eye(size)) @ full, -gradient, atol=1e-6 * (1 + np.abs(gradient).max())
        )
        assert used >= -whole.smallest - 1e-7


def test_the_hard_case_of_the_cubic_step() -> None:
    """The gradient has nothing along the negative direction: the step takes it all the same."""
    model = complete_model(np.diag([-1.0, 2.0]), np.array([0.0, 0.1]))
    step, shift = model.cubic(1.0)
    assert shift == pytest.approx(1.0)
    assert np.linalg.norm(step) == pytest.approx(2.0)
    assert model.change(step) < -1.5


def test_criteria() -> None:
    assert scaled_gradient(np.array([1e-3]), np.array([1e3]), 0.5) == pytest.approx(1.0)
    assert not is_second_order(-1.0, 1e-3)
    # 1e-6 x^2 / 2 at x = 1e3: the curvature is tiny, the gap is .5, and the decrement says so.
    flat = judge(np.array([1e-6]), np.array([1e-3]), np.array([1e-3]), np.array([1e3]), 0.5)
    assert flat.newton_decrement == pytest.approx(0.5)
    assert not flat.stop
    # |g| / |H| = 1e-8 at diag(1e8, 1), theta = (0, 1), while the gap is .5.
    assert newton_decrement(np.array([1e8, 1.0]), np.array([0.0, 1.0])) == pytest.approx(0.5)
    # x^4 / 4 - y^2 / 2 at the origin: stationary, and a saddle.
    saddle = judge(np.array([-1.0, 0.0]), np.zeros(2), np.zeros(2), np.zeros(2), 0.0)
    assert saddle.first_order
    assert not saddle.second_order
    assert not saddle.stop
    done = judge(np.array([1.0, 2.0]), np.zeros(2), np.zeros(2), np.ones(2), 1.0)
    assert done.stop
    assert newton_decrement(np.array([-1.0]), np.array([1.0])) == float("inf")
    assert not has_stalled(0.1, np.array([1e-12]), 1.0, np.array([1.0]), 1e-8)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(0, 1000))
def test_the_decrement_is_invariant(size: int, seed: int) -> None:
    """Under any change of variables, with no shift."""
    generator = np.random.default_rng(seed)
    matrix = symmetric(size, seed, generator.uniform(0.5, 3, size))
    gradient, change = generator.standard_normal(size), generator.standard_normal((size, size)) + 3 * np.eye(size)
    there = complete_model(change.T @ matrix @ change, change.T @ gradient)
    here = complete_model(matrix, gradient)
    if there.smallest > 1e-6:
        assert newton_decrement(there.eigenvalues, there.coefficients) == pytest.approx(
            newton_decrement(here.eigenvalues, here.coefficients), rel=1e-6
        )
