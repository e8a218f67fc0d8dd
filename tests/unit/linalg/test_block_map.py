"""Norms, traces and couplings of blocks from random vectors: unbiased, exact where they say so, and intervals that hold."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from disthess.linalg.block_map import BlockMap, Interval, Places, estimate_block_map
from disthess.linalg.operator import DenseOperator

BLOCKS: list[Places] = [slice(0, 40), slice(40, 110), np.arange(111, 191, 2), slice(191, 194)]
SIZE = 194


def truth(matrix: np.ndarray, blocks: list[Places]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Norms, couplings and traces from the matrix itself."""
    norms = np.array([[np.linalg.norm(matrix[a][:, b]) for b in blocks] for a in blocks])
    own = np.diagonal(norms)
    return norms, norms / np.sqrt(np.outer(own, own)), np.array([np.trace(matrix[a][:, a]) for a in blocks])


def matrices() -> Iterator[tuple[str, np.ndarray]]:
    """Full rank, low rank, and one outlier over noise; definite and not."""
    random = np.random.default_rng(5)
    noise = random.standard_normal((SIZE, SIZE))
    yield "indefinite", noise + noise.T
    factors = random.standard_normal((8, SIZE)) / np.arange(1, 9)[:, None]
    yield "low rank", factors.T @ factors
    steep = random.standard_normal((SIZE, SIZE)) / np.arange(1, SIZE + 1)[:, None]
    yield "power law", steep.T @ steep
    spike = random.standard_normal(SIZE)
    yield "spike", 0.5 * np.outer(spike, spike) + 0.1 * (noise + noise.T)


def holds(interval: Interval, wanted: np.ndarray) -> np.ndarray:
    return (interval.low <= wanted) & (wanted <= interval.high)


def coverage(matrix: np.ndarray, probes: int, runs: int, confidence: float = 0.95) -> dict[str, float]:
    """How often intervals hold the truth, of those that are not exact."""
    norms, couplings, traces = truth(matrix, BLOCKS)
    pairs = np.tril_indices(len(BLOCKS))
    below = np.tril_indices(len(BLOCKS), -1)
    seen: dict[str, list[np.ndarray]] = {"norm": [], "coupling": [], "trace": []}
    operator = DenseOperator(matrix)
    for seed in range(runs):
        found = estimate_block_map(operator, BLOCKS, probes=probes, confidence=confidence, seed=seed)
        apart = found.norm.high > found.norm.low
        seen["norm"].append(holds(found.norm, norms)[pairs][apart[pairs]])
        seen["coupling"].append(
            holds(found.coupling, couplings)[below][(found.coupling.high > found.coupling.low)[below]]
        )
        seen["trace"].append(holds(found.trace, traces)[found.trace.high > found.trace.low])
    return {key: float(np.concatenate(values).mean()) for key, values in seen.items()}


@pytest.mark.parametrize("name", [name for name, _ in matrices()])
def test_intervals_hold_as_often_as_they_say(name: str) -> None:
    matrix = dict(matrices())[name]
    for key, found in coverage(matrix, probes=10, runs=150).items():
        assert 0.92 <= found <= 0.98, (key, found)


@pytest.mark.slow
@pytest.mark.parametrize("probes", [10, 16, 32])
@pytest.mark.parametrize("name", [name for name, _ in matrices()])
def test_intervals_hold_in_many_runs(name: str, probes: int) -> None:
    matrix = dict(matrices())[name]
    for key, found in coverage(matrix, probes=probes, runs=1000).items():
        # Norms' degrees of freedom are taken low: see `disthess.linalg.chi_square`.
        low, high = (0.94, 0.98) if key == "norm" else (0.93, 0.97)
        assert low <= found <= high, (key, found)


@pytest.mark.parametrize("name", [name for name, _ in matrices()])
def test_four_vectors_are_no_reason_to_promise_too_much_of_norms(name: str) -> None:
    """Degrees of freedom as four vectors have them hold in 89 to 94 %."""
    assert coverage(dict(matrices())[name], probes=4, runs=150)["norm"] >= 0.94


def test_other_confidences_are_kept_too() -> None:
    matrix = dict(matrices())["power law"]
    for key, found in coverage(matrix, probes=12, runs=150, confidence=0.8).items():
        assert 0.75 <= found <= 0.86, (key, found)


def test_estimates_have_no_bias() -> None:
    matrix = dict(matrices())["indefinite"]
    norms, _, traces = truth(matrix, BLOCKS)
    found = [estimate_block_map(DenseOperator(matrix), BLOCKS, probes=8, seed=seed) for seed in range(300)]
    squares = np.array([entry.norm.value**2 for entry in found])
    apart = np.abs(squares.mean(0) - norms**2)
    assert np.all(apart <= 4 * squares.std(0) / np.sqrt(len(found)) + 1e-9)
    values = np.array([entry.trace.value for entry in found])
    assert np.all(np.abs(values.mean(0) - traces) <= 4 * values.std(0) / np.sqrt(len(found)) + 1e-9)


def test_small_blocks_are_exact_and_cost_no_more_than_they_have_entries() -> None:
    matrix = dict(matrices())["spike"]
    norms, couplings, traces = truth(matrix, BLOCKS)
    found = estimate_block_map(DenseOperator(matrix), BLOCKS, probes=70)
    assert found.products == 40 + 70 + 40 + 3
    for interval, wanted in ((found.norm, norms), (found.coupling, couplings), (found.trace, traces)):
        np.testing.assert_allclose(interval.value, wanted, rtol=1e-12)
        np.testing.assert_array_equal(interval.low, interval.high)
    some = estimate_block_map(DenseOperator(matrix), BLOCKS, probes=4)
    np.testing.assert_allclose(some.norm.value[3], norms[3], rtol=1e-12)
    assert some.norm.high[0, 1] > some.norm.low[0, 1]
    assert some.products == 4 * 3 + 3


def test_zero_blocks_are_zero_and_without_a_coupling() -> None:
    matrix = np.zeros((40, 40))
    matrix[:20, :20] = np.diag(np.arange(1.0, 21))
    found = estimate_block_map(DenseOperator(matrix), [slice(0, 10), slice(10, 20), slice(20, 40)], probes=6)
    assert found.norm.high[0, 1] == 0
    assert found.coupling.high[0, 1] == 0
    assert np.isnan(found.coupling.value[0, 2])
    assert np.isnan(found.coupling.value[2, 2])
    assert found.trace.low[2] == found.trace.high[2] == 0


def test_the_same_seed_gives_the_same_numbers() -> None:
    matrix = dict(matrices())["indefinite"]
    once, again, other = (estimate_block_map(DenseOperator(matrix), BLOCKS, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(once.norm.value, again.norm.value)
    assert np.any(once.norm.value != other.norm.value)


def test_progress_counts_blocks_and_wrong_arguments_are_refused() -> None:
    calls: list[tuple[int, int]] = []
    found: BlockMap = estimate_block_map(
        DenseOperator(np.eye(6)),
        [slice(0, 3), slice(3, 6)],
        probes=4,
        progress=lambda done, of: calls.append((done, of)),
    )
    assert calls == [(1, 2), (2, 2)]
    assert found.confidence == 0.95
    for options in ({"probes": 3}, {"confidence": 1.0}):
        with pytest.raises(ValueError, match="probes must be"):
            estimate_block_map(DenseOperator(np.eye(6)), [slice(0, 6)], **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="empty"):
        estimate_block_map(DenseOperator(np.eye(6)), [slice(2, 2)])
