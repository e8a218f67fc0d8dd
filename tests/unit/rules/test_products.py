"""Products of matrices, by either library: the same numbers, in place too, and only where nothing is differentiated."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from disthess.rules import products

faster = pytest.mark.skipif(not products.has_faster_library(), reason="this processor multiplies by MKL alone")

SHAPES = ((1, 1, 1), (3, 5, 7), (128, 128, 128), (640, 450, 97), (4096, 32, 96), (32, 256, 4096))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("turned", ["", "left", "right", "both"])
def test_products_are_those_of_double_precision(shape: tuple[int, int, int], dtype: torch.dtype, turned: str) -> None:
    torch.manual_seed(0)
    rows, inner, columns = shape
    left, right = torch.randn(rows, inner, dtype=dtype), torch.randn(inner, columns, dtype=dtype)
    if turned in ("left", "both"):
        left = left.T.contiguous().T
    if turned in ("right", "both"):
        right = right.T.contiguous().T
    wanted = left.double() @ right.double()
    room = 8 * torch.finfo(dtype).eps * inner**0.5 * float(wanted.abs().max())
    with torch.no_grad():
        found = products.product(left, right)
        stack = products.product(left.expand(2, rows, inner), right)
        total = torch.ones(rows, columns + 3, dtype=dtype)
        products.add_product(total[:, 1:-2], left, right)
        totals = torch.ones(2, rows, columns, dtype=dtype)
        products.add_products(totals, left, torch.stack([right, -right]))
    assert found.dtype == dtype
    assert stack.shape == (2, rows, columns)
    assert (found - wanted).abs().max() <= room
    assert (stack - wanted).abs().max() <= room
    assert (total[:, 1:-2] - 1 - wanted).abs().max() <= room + 8 * torch.finfo(dtype).eps
    assert (totals[0] - 1 - wanted).abs().max() <= room + 8 * torch.finfo(dtype).eps
    assert (totals[1] - 1 + wanted).abs().max() <= room + 8 * torch.finfo(dtype).eps
    assert (total[:, [0, -2, -1]] == 1).all(), "no column beside it is touched"


@faster
def test_the_faster_library_is_asked_for_large_products_alone() -> None:
    large, small = torch.randn(128, 128), torch.randn(8, 8)
    with mock.patch.object(torch, "matmul", side_effect=AssertionError), torch.no_grad():
        products.product(large, large)
        with pytest.raises(AssertionError):
            products.product(small, small)
        with pytest.raises(AssertionError):
            products.product(large.double(), large.double())


@faster
def test_a_sum_is_added_to_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    left, right = torch.randn(64, 300), torch.randn(300, 1000)
    whole, pieces = torch.zeros(64, 1000), torch.zeros(64, 1000)
    sizes: list[tuple[int, int]] = []
    multiply = products.product
    with torch.no_grad():
        products.add_product(whole, left, right)
        monkeypatch.setattr(products, "PIECE", 64 * 300)
        monkeypatch.setattr(products, "product", lambda a, b: sizes.append((len(a), b.shape[1])) or multiply(a, b))
        products.add_product(pieces, left, right)
    assert sizes == [(32, 600), (32, 600), (48, 400), (16, 400)]
    assert all(rows * columns <= 64 * 300 for rows, columns in sizes)
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(whole.double(), left.double() @ right.double(), rtol=1e-5, atol=1e-3)


@faster
@pytest.mark.parametrize("turned", [False, True])
def test_the_faster_library_is_given_a_right_operand_without_gaps(turned: bool) -> None:
    """It takes a thousand times as long with one: a second where this takes a thousandth."""
    torch.manual_seed(2)
    wide = torch.randn(600, 600)
    right = wide.T[:300, :500] if turned else wide[:300, :500]
    left = torch.randn(200, 600)[:, :300]
    library, given = torch.ops.mkldnn._linear_pointwise, []

    def noted(a: torch.Tensor, b: torch.Tensor, *rest: object) -> torch.Tensor:
        given.append(b)
        return library(a, b, *rest)

    with mock.patch.object(torch.ops.mkldnn, "_linear_pointwise", noted), torch.no_grad():
        found = products.product(left, right)
    assert len(given) == 1
    assert given[0].is_contiguous() or given[0].T.is_contiguous()
    torch.testing.assert_close(found.double(), left.double() @ right.double(), rtol=1e-5, atol=1e-3)


def test_what_is_differentiated_is_left_to_autograd() -> None:
    left, right = torch.randn(128, 128, requires_grad=True), torch.randn(128, 128)
    products.product(left, right).sum().backward()
    torch.testing.assert_close(left.grad, right.sum(1).expand(128, 128))


@pytest.mark.parametrize(
    ("vendor", "capability", "faster"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
        ("", "AVX512", False),
    ],
)
def test_the_rule_goes_by_the_processor(vendor: str, capability: str, faster: bool) -> None:
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    with (
        mock.patch.object(products, "_vendor", return_value=vendor),
        mock.patch.object(torch.backends.cpu, "get_cpu_capability", return_value=capability),
    ):
        assert products.has_faster_library.__wrapped__() == faster
