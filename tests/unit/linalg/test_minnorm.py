"""The smallest point of a hull against a quadratic program solved another way."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from disthess.linalg.minnorm import min_norm_weights


@pytest.mark.parametrize("seed", range(30))
def test_against_a_quadratic_program(seed: int) -> None:
    draw = np.random.default_rng(seed)
    points = draw.standard_normal((draw.integers(1, 9), draw.integers(1, 6))) + draw.standard_normal() * 0.8
    weights = min_norm_weights(points @ points.T)
    assert weights.min() >= 0
    assert weights.sum() == pytest.approx(1.0)
    found = points.T @ weights
    # Optimality: no point of the hull lies on the near side of the plane through the one found.
    assert (points @ found).min() >= found @ found - 1e-9
    start = np.full(len(points), 1 / len(points))
    other = minimize(
        lambda t: ((points.T @ t) ** 2).sum(), start, bounds=[(0, 1)] * len(points),
        constraints={"type": "eq", "fun": lambda t: t.sum() - 1}, tol=1e-14,
    )  # fmt: skip
    assert np.linalg.norm(found) <= np.linalg.norm(points.T @ other.x) + 1e-6


def test_zero_inside_copies_and_single_points() -> None:
    square = np.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    assert np.linalg.norm(square.T @ min_norm_weights(square @ square.T)) < 1e-12
    twice = np.array([[3.0, 4.0], [3.0, 4.0]])
    assert np.linalg.norm(twice.T @ min_norm_weights(twice @ twice.T)) == pytest.approx(5.0)
    np.testing.assert_array_equal(min_norm_weights(np.zeros((1, 1))), [1.0])
    opposite = np.array([[0.0, 1.0], [0.0, -1.0], [2.0, 0.0]])
    assert np.linalg.norm(opposite.T @ min_norm_weights(opposite @ opposite.T)) < 1e-12
