"""Spectral density against exact eigenvalues and moments."""

from __future__ import annotations

import numpy as np
import pytest

from disthess.linalg.density import spectral_density
from disthess.linalg.operator import DenseOperator


def rotated(values: np.ndarray) -> DenseOperator:
    basis = np.linalg.qr(np.random.default_rng(1).standard_normal((len(values), len(values))))[0]
    return DenseOperator((basis * values) @ basis.T)


@pytest.mark.parametrize(
    "values", [np.linspace(-3, 5, 200), np.r_[np.zeros(180), np.ones(20)], np.zeros(50)], ids=["even", "two", "zero"]
)
def test_it_integrates_to_one(values: np.ndarray) -> None:
    found = spectral_density(rotated(values), steps=20)
    np.testing.assert_allclose(np.trapezoid(found.density, found.grid), 1.0, atol=1e-12)
    np.testing.assert_allclose(found.weights.sum(), 1.0, atol=1e-12)
    assert (found.density >= 0).all()


def test_a_full_block_gives_the_exact_spectrum() -> None:
    wanted = np.sort(np.random.default_rng(3).normal(size=40))
    found = spectral_density(rotated(wanted), probes=40, steps=3)
    np.testing.assert_allclose(found.nodes, wanted, atol=1e-10)
    np.testing.assert_allclose(found.weights, 1 / 40, atol=1e-12)


def test_an_invariant_space_ends_the_steps() -> None:
    values = np.repeat([-2.0, 0.5, 4.0], [10, 50, 40])
    found = spectral_density(rotated(values), probes=4, steps=50)
    # Three different eigenvalues: four probes span twelve dimensions, no more.
    assert found.products == 12
    np.testing.assert_allclose(found.nodes, np.repeat([-2.0, 0.5, 4.0], 4), atol=1e-9)
    mass = [found.weights[found.nodes < 0].sum(), found.weights[found.nodes > 1].sum()]
    np.testing.assert_allclose(mass, [0.1, 0.4], atol=0.15)


def test_moments_are_those_of_the_probes() -> None:
    # Lanczos quadrature with m steps is exact for polynomials up to degree 2 m - 1 of its own start vectors.
    operator = rotated(np.linspace(-1, 2, 300))
    start = np.linalg.qr(np.random.default_rng(9).standard_normal((300, 3)))[0]
    found = spectral_density(operator, probes=3, steps=5, seed=9)
    power = start
    for degree in range(1, 10):
        power = operator.matmat(power)
        wanted = np.einsum("pk,pk->", start, power) / 3
        np.testing.assert_allclose((found.weights * found.nodes**degree).sum(), wanted, rtol=1e-9, atol=1e-12)


def test_the_scatter_of_probes_covers_the_error() -> None:
    values = np.concatenate([np.random.default_rng(2).normal(size=380), np.linspace(6, 8, 20)])
    found = spectral_density(rotated(values), probes=12, steps=60, width=0.3, points=200)
    kernel = np.exp(-0.5 * ((found.grid[:, None] - values) / 0.3) ** 2) / (0.3 * np.sqrt(2 * np.pi))
    miss = np.abs(found.density - kernel.mean(axis=1)) / np.maximum(found.standard_error, 1e-6)
    assert np.mean(miss < 3) > 0.9
    assert found.standard_error.max() < 0.1


def test_one_by_one_and_one_probe() -> None:
    found = spectral_density(DenseOperator(np.array([[2.5]])))
    np.testing.assert_allclose(found.nodes, [2.5])
    assert np.isnan(found.standard_error).all()


def test_bad_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        spectral_density(DenseOperator(np.eye(3)), probes=0)
