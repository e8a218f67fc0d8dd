"""Lanczos quadratures: densities and shares that bracket the truth, with and without room for a basis."""

from __future__ import annotations

import numpy as np
import pytest

from disthess.linalg.operator import DenseOperator
from disthess.linalg.quadrature import (
    ends,
    quadrature_bytes,
    share_below,
    smooth,
    smooth_eigenvalues,
    take_quadratures,
)

SIZE = 320


def rotated(values: np.ndarray) -> np.ndarray:
    axes = np.linalg.qr(np.random.default_rng(2).standard_normal((len(values), len(values))))[0]
    return axes * values @ axes.T


@pytest.mark.parametrize("memory_bytes", [2**30, 1])
def test_nodes_integrate_polynomials_exactly(memory_bytes: int) -> None:
    matrix = rotated(np.linspace(-1.0, 2.0, SIZE))
    taken = take_quadratures(DenseOperator(matrix), probes=3, steps=6, seed=4, memory_bytes=memory_bytes)
    assert taken.orthogonal == (memory_bytes > 1)
    assert taken.products == 18
    generator = np.random.default_rng(4)
    starts = (
        generator.standard_normal((3, SIZE))
        if memory_bytes > 1
        else [generator.standard_normal(SIZE) for _ in range(3)]
    )
    for start, one in zip(starts, taken.each, strict=True):
        unit = start / np.linalg.norm(start)
        for power in range(12):
            wanted = unit @ np.linalg.matrix_power(matrix, power) @ unit
            assert (one.weights * one.nodes**power).sum() == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def test_residuals_of_nodes_bound_their_distance_from_an_eigenvalue() -> None:
    values = np.sort(np.random.default_rng(0).standard_normal(SIZE))
    for one in take_quadratures(DenseOperator(rotated(values)), steps=15).each:
        apart = np.abs(one.nodes[:, None] - values).min(axis=1)
        assert np.all(apart <= one.residuals + 1e-12)
    low, high = ends(take_quadratures(DenseOperator(rotated(values)), steps=60))
    assert low.low - 1e-9 <= values[0] <= low.high + 1e-9
    assert high.low - 1e-9 <= values[-1] <= high.high + 1e-9


SPECTRA = {
    "noise": np.random.default_rng(3).standard_normal(SIZE),
    "bulk at zero": np.concatenate([np.full(200, 1e-3), np.full(60, -1e-3), np.linspace(0.1, 5, 60)]),
    "few values": np.repeat([-1.0, 0.0, 1.0], [20, 280, 20]),
    "heavy": np.random.default_rng(1).standard_t(1, SIZE),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_a_share_lies_in_its_interval(name: str) -> None:
    values = SPECTRA[name]
    operator, place = DenseOperator(rotated(values)), -1e-9 * np.abs(values).max()
    wanted = (values < place).mean()
    held = 0
    for seed in range(60):
        found = share_below(take_quadratures(operator, probes=6, steps=25, seed=seed), place)
        assert 0 <= found.low <= found.value <= found.high <= 1
        held += found.low <= wanted <= found.high
    assert held >= 52


def test_where_the_space_is_whole_only_the_sample_is_uncertain() -> None:
    operator = DenseOperator(rotated(SPECTRA["few values"]))
    held = 0
    for seed in range(300):
        taken = take_quadratures(operator, probes=6, steps=10, seed=seed)
        assert all(one.whole and len(one.nodes) <= 4 for one in taken.each)
        found = share_below(taken, -1e-9)
        held += found.low <= 20 / SIZE <= found.high
    assert 0.912 <= held / 300 <= 0.988


def test_the_density_is_one_altogether_and_near_the_truth() -> None:
    values = SPECTRA["noise"]
    found = smooth(take_quadratures(DenseOperator(rotated(values)), probes=8, steps=60), width=0.3)
    assert np.trapezoid(found.value, found.grid) == pytest.approx(1.0, abs=1e-3)
    kernel = np.exp(-0.5 * ((found.grid[:, None] - values) / 0.3) ** 2) / (0.3 * np.sqrt(2 * np.pi))
    assert np.abs(found.value - kernel.mean(axis=1)).max() <= 6 * found.error.max()
    exact = smooth_eigenvalues(values)
    assert np.trapezoid(exact.value, exact.grid) == pytest.approx(1.0, abs=1e-3)
    assert not exact.error.any()


def test_memory_is_what_was_allowed() -> None:
    assert quadrature_bytes(1000, 8, 40, 2**30) == 8 * 43 * 8000
    assert quadrature_bytes(1000, 8, 40, 3 * 40 * 8000) == 3 * 43 * 8000
    assert quadrature_bytes(1000, 8, 40, 1000) == 3 * 8000
