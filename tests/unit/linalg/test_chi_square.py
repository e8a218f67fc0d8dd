"""Means of weighted chi-squares: degrees of freedom that few vectors do not overrate, and ends that follow their skewness."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from disthess.linalg.chi_square import chi_square_ends, form_ends, mean_and_freedom

WEIGHTS = {
    "one over noise": np.concatenate([[1.0], np.full(99, 0.01)]),
    "two over noise": np.concatenate([[1.0, 0.2], np.full(50, 0.01)]),
    "power law": np.arange(1.0, 100) ** -1.5,
    "one": np.ones(1),
    "flat": np.ones(100),
}


def gram(weights: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    return vectors.T @ (weights[:, None] * vectors)


@pytest.mark.parametrize("name", WEIGHTS)
def test_intervals_from_twelve_vectors_hold(name: str) -> None:
    """Degrees of freedom as they are found hold in 90 to 92 % where few weights stand out."""
    weights, random, held = WEIGHTS[name], np.random.default_rng(2), 0
    runs = 2000
    for _ in range(runs):
        mean, freedom = mean_and_freedom([gram(weights, random.standard_normal((len(weights), 12)))], len(weights))
        low, high = chi_square_ends(mean, freedom, 0.025)
        held += low <= weights.sum() <= high
    # Three standard errors of so many runs below 95 %, and above 97.5.
    assert 0.935 <= held / runs <= 0.985


@pytest.mark.parametrize("sets", [1, 2])
def test_the_degrees_are_those_of_all_vectors_less_a_standard_error_of_the_jackknife(sets: int) -> None:
    random = np.random.default_rng(0)
    weights = np.arange(1.0, 30) ** -0.5
    blocks = [random.standard_normal((29, 7)) for _ in range(sets)]

    def logarithm(kept: list[np.ndarray]) -> float:
        grams = [gram(weights, block) for block in kept]
        samples = np.concatenate([np.diagonal(one) for one in grams])
        first = np.mean([a * b for i, a in enumerate(samples) for j, b in enumerate(samples) if i != j])
        second = np.mean([np.mean([one[i, j] ** 2 for i in range(len(one)) for j in range(i)]) for one in grams])
        return float(np.log(first / second))

    apart = np.array(
        [
            logarithm(
                [np.delete(block, column, axis=1) if here == place else block for here, block in enumerate(blocks)]
            )
            for place in range(sets)
            for column in range(7)
        ]
    )
    error = np.sqrt((len(apart) - 1) / len(apart) * ((apart - apart.mean()) ** 2).sum())
    mean, freedom = mean_and_freedom([gram(weights, block) for block in blocks], 29)
    assert freedom == pytest.approx(7 * sets * np.exp(logarithm(blocks) - error), rel=1e-9)
    assert mean == pytest.approx(np.mean([np.trace(gram(weights, block)) / 7 for block in blocks]))


def test_rank_one_has_one_degree_per_vector_and_none_more_than_the_rank_allows() -> None:
    random = np.random.default_rng(1)
    assert mean_and_freedom([gram(np.ones(1), random.standard_normal((1, 9)))], 5)[1] == pytest.approx(9)
    assert mean_and_freedom([gram(np.ones(500), random.standard_normal((500, 9)))], 3)[1] == 27
    assert mean_and_freedom([np.zeros((9, 9))], 3) == (0.0, 9.0)


def test_forms_of_rank_one_scale_as_their_chi_square() -> None:
    random = np.random.default_rng(3)
    low, high = form_ends(5.0, 2.0 * np.ones((12, 12)), 0.025)
    deviate = stats.norm.sf(stats.t.isf(0.025, 11))
    ends = 5 + 2 * (12 / stats.chi2.ppf([1 - deviate, deviate], 12) - 1)
    assert (low, high) == pytest.approx(tuple(ends))
    # Turned over, the long side is the other one.
    assert form_ends(-5.0, -2.0 * np.ones((12, 12)), 0.025) == pytest.approx((-high, -low))
    assert form_ends(5.0, np.zeros((12, 12)), 0.025) == (5.0, 5.0)
    # As many positive as negative eigenvalues: Student's t, nearly.
    signs = np.where(np.arange(400) % 2, 1.0, -1.0)
    low, high = form_ends(0.0, gram(signs, random.standard_normal((400, 12))), 0.025)
    assert high / -low == pytest.approx(1, abs=0.25)
    assert high - low == pytest.approx(2 * stats.t.isf(0.025, 11) * np.sqrt(2 * 400 / 12), rel=0.2)
