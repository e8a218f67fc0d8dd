"""Nearest Kronecker products against the singular value decomposition of the rearranged block."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disthess.linalg.kronecker import DENSE_SIDE, KroneckerResult, expected_product, nearest_product
from disthess.linalg.rearranged import BlockRearranged, CrossRearranged, FlippedRearranged, SumRearranged


def best_error(block: np.ndarray) -> float:
    """Of ``[o_v, i_v, o_w, i_w]``, by the dense way."""
    ov, iv, ow, iw = block.shape
    values = np.linalg.svd(block.transpose(0, 2, 1, 3).reshape(ov * ow, iv * iw), compute_uv=False)
    return float(np.sqrt((values[1:] ** 2).sum()))


def layer(samples: int, rows: int, outputs: int, inputs: int, seed: int) -> tuple[SumRearranged, np.ndarray]:
    """A layer's sum, and the block that it is."""
    generator = np.random.default_rng(seed)
    curvature = generator.standard_normal((samples, rows * outputs, rows * outputs))
    curvature = (curvature + curvature.transpose(0, 2, 1)).reshape(samples, rows, outputs, rows, outputs)
    x, decay = generator.standard_normal((samples, rows, inputs)), generator.uniform(size=inputs)
    block = np.einsum("nrasb,nrj,nsk->ajbk", curvature, x, x)
    block += np.einsum("ab,jk->ajbk", np.eye(outputs), np.diag(decay))
    return SumRearranged(curvature, x, decay), block


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(0, 10_000))
def test_a_sum_has_the_nearest_product_of_its_block(n: int, rows: int, outputs: int, inputs: int, seed: int) -> None:
    matrix, block = layer(n, rows, outputs, inputs, seed)
    scale = np.linalg.norm(block)
    for found in (nearest_product(matrix), nearest_product(BlockRearranged(block, True))):
        assert found.error == pytest.approx(best_error(block), abs=1e-12 * scale)
        flat = block.reshape(outputs * inputs, -1)
        assert np.linalg.norm(flat - found.dense()) == pytest.approx(found.error, abs=1e-12 * scale)
        assert found.norm == pytest.approx(scale)
        assert np.linalg.norm(found.outer) == pytest.approx(np.linalg.norm(found.inner))


def test_large_layers_take_the_iteration() -> None:
    matrix, block = layer(30, 1, 18, 20, 0)
    assert min(18 * 18, 20 * 20) > DENSE_SIDE
    for found in (nearest_product(matrix), nearest_product(BlockRearranged(block, True))):
        assert found.error == pytest.approx(best_error(block), rel=1e-10)
        np.testing.assert_array_equal(found.outer, found.outer.T)


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("rows", [(1, 1), (2, 3)])
def test_a_block_between_layers(flipped: bool, rows: tuple[int, int]) -> None:
    generator = np.random.default_rng(3)
    n, ov, iv, ow, iw = 9, 3, 4, 2, 5
    r, s = rows
    curvature, deltas = generator.standard_normal((n, r, ov, s, ow)), generator.standard_normal((n, r, ov))
    moved, later = generator.standard_normal((n, r, iv, s, ow)), generator.standard_normal((n, r, iv))
    earlier = generator.standard_normal((n, s, iw))
    block = np.einsum("nrask,nrj,nsl->ajkl", curvature, later, earlier)
    block += np.einsum("nra,nrjsk,nsl->ajkl", deltas, moved, earlier)
    plain = CrossRearranged(curvature, deltas, moved, later, earlier)
    found = nearest_product(FlippedRearranged(plain) if flipped else plain)
    assert found.error == pytest.approx(best_error(block), rel=1e-12)
    dense = found.dense().T if flipped else found.dense()
    assert np.linalg.norm(block.reshape(ov * iv, -1) - dense) == pytest.approx(found.error, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_the_error_of_expectations_is_the_covariance(seed: int) -> None:
    """``E[H (x) X] - E[H] (x) E[X]`` has the norm of Cov(vec H, vec X); it is never below the nearest product's."""
    generator = np.random.default_rng(seed)
    n, outputs, inputs = 25, 3, 4
    each = generator.standard_normal((n, outputs, outputs))
    each, x = each + each.transpose(0, 2, 1), generator.standard_normal((n, inputs))
    matrix = SumRearranged((each / n)[:, None, :, None], x[:, None], np.zeros(inputs))
    found = expected_product(matrix, *matrix.expectation())
    h, xx = each.reshape(n, -1), np.einsum("nj,nk->njk", x, x).reshape(n, -1)
    covariance = h.T @ xx / n - np.outer(h.mean(0), xx.mean(0))
    assert found.error == pytest.approx(np.linalg.norm(covariance), rel=1e-12)
    assert nearest_product(matrix).error <= found.error


@pytest.mark.parametrize("case", ["one sample", "constant curvature", "constant inputs"])
def test_exact_where_it_should_be(case: str) -> None:
    """To rounding, although the error is a difference of large numbers: both ways of summing it."""
    generator = np.random.default_rng(0)
    n = 1 if case == "one sample" else 40
    curvature = generator.standard_normal((n, 1, 6, 1, 6))
    curvature = curvature + curvature.transpose(0, 1, 4, 3, 2)
    x = generator.standard_normal((n, 1, 7))
    if case == "constant curvature":
        curvature[:] = curvature[0]
    if case == "constant inputs":
        x[:] = x[0]
    matrix = SumRearranged(curvature, x, np.zeros(7))
    for found in (nearest_product(matrix), expected_product(matrix, *matrix.expectation())):
        assert found.relative_error < 1e-14
        error, norm = matrix._residual_by_terms(found.outer, found.inner)
        assert error < 1e-14 * norm * n
        assert norm == pytest.approx(found.norm)


def test_a_skew_pair_can_be_the_nearest() -> None:
    """J (x) J is symmetric, and no product of symmetric matrices comes near it."""
    turn = np.array([[0.0, 1.0], [-1.0, 0.0]])
    found = nearest_product(BlockRearranged(np.kron(turn, turn).reshape(2, 2, 2, 2), True))
    assert found.error < 1e-14
    np.testing.assert_allclose(found.outer, -found.outer.T)
    right = np.arange(4.0)
    answer = found.solve(right, 0.3)
    np.testing.assert_allclose(found.apply(answer) + 0.3 * answer, right, atol=1e-13)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 10_000), st.floats(0.1, 10.0))
def test_the_damped_inverse(outputs: int, inputs: int, seed: int, damping: float) -> None:
    generator = np.random.default_rng(seed)
    outer, inner = generator.standard_normal((outputs, outputs)), generator.standard_normal((inputs, inputs))
    found = KroneckerResult(outer @ outer.T, inner @ inner.T, "nearest", 0.0, 1.0)
    right = generator.standard_normal((outputs * inputs, 3))
    whole = np.kron(found.outer, found.inner)
    np.testing.assert_allclose(found.dense(), whole)
    np.testing.assert_allclose(found.apply(right), whole @ right, atol=1e-10 * (1 + np.abs(whole).max()))
    wanted = np.linalg.solve(whole + damping * np.eye(len(whole)), right)
    np.testing.assert_allclose(found.solve(right, damping), wanted, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(found.solve(right[:, 0], damping), wanted[:, 0], rtol=1e-7, atol=1e-9)


def test_singular_and_oblong_products_are_refused() -> None:
    with pytest.raises(ValueError, match="singular"):
        KroneckerResult(np.diag([1.0, 0.0]), np.eye(2), "nearest", 0.0, 1.0).solve(np.ones(4), 0.0)
    for wrong in (np.ones(3), np.full(4, np.nan)):
        with pytest.raises(ValueError, match="4 finite numbers"):
            KroneckerResult(np.eye(2), np.eye(2), "nearest", 0.0, 1.0).solve(wrong, 1.0)
    with pytest.raises(ValueError, match="symmetric"):
        KroneckerResult(np.ones((2, 3)), np.ones((2, 3)), "nearest", 0.0, 1.0).solve(np.ones(4), 1.0)


def test_a_block_of_zeros() -> None:
    found = nearest_product(BlockRearranged(np.zeros((2, 3, 2, 3)), True))
    assert (found.error, found.relative_error) == (0.0, 0.0)
    big = nearest_product(BlockRearranged(np.zeros((17, 18, 17, 18)), True))
    assert big.error == 0.0
