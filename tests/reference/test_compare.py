"""The table of approximations against dense matrices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import disthess
from disthess.comparison import Comparison, ComparisonRow
from disthess.errors import ConfigError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))


def problem(**options: object) -> disthess.Problem:
    torch.manual_seed(0)
    batches = [(torch.randn(n, 4).double(), torch.randint(0, 3, (n,))) for n in (15, 6)]
    return disthess.Problem(Net().double(), loss="cross_entropy", batches=batches, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def found() -> Comparison:
    return disthess.compare(problem(), ranks=(2, 6))


@pytest.fixture(scope="module")
def exact() -> np.ndarray:
    return disthess.reference_hessian(problem())


GROUPS = (slice(0, 25), slice(25, 35), slice(35, 50))


def row(found: Comparison, name: str) -> ComparisonRow:
    return next(entry for entry in found.rows if entry.name == name)


def check(entry: ComparisonRow, exact: np.ndarray, other: np.ndarray) -> None:
    assert entry.frobenius_error == pytest.approx(np.linalg.norm(exact - other) / np.linalg.norm(exact), rel=1e-6)
    assert entry.spectral_error == pytest.approx(np.linalg.norm(exact - other, 2) / np.linalg.norm(exact, 2), rel=1e-3)


def test_every_kind_of_approximation_is_there(found: Comparison) -> None:
    assert [entry.name for entry in found.rows] == [
        "exact", "ggn", "block-diagonal", "diagonal", "kronecker, nearest", "kronecker, expectation", "kronecker, K-FAC",
        "low rank 2", "low rank 6", "blocks of rank 2",
    ]  # fmt: skip
    assert found.left_out == ()
    assert all(entry.seconds > 0 for entry in found.rows)


def test_errors_are_those_of_the_dense_matrices(found: Comparison, exact: np.ndarray) -> None:
    assert found.frobenius == pytest.approx(np.linalg.norm(exact))
    assert found.spectral == pytest.approx(np.linalg.norm(exact, 2), rel=1e-3)
    check(row(found, "ggn"), exact, disthess.reference_hessian(problem(), part="ggn"))
    check(row(found, "diagonal"), exact, np.diag(np.diag(exact)))
    blocks = np.zeros_like(exact)
    for group in GROUPS:
        blocks[group, group] = exact[group, group]
    check(row(found, "block-diagonal"), exact, blocks)
    values = np.linalg.eigvalsh(exact)
    order = np.argsort(-np.abs(values))
    for rank in (2, 6):
        best = np.linalg.norm(values[order[rank:]]) / np.linalg.norm(values)
        assert best * (1 - 1e-9) <= row(found, f"low rank {rank}").frobenius_error <= 1.3 * best + 1e-9


def test_kfac_is_the_product_of_expectations(found: Comparison, exact: np.ndarray) -> None:
    """Built by hand from np.kron, the normalisation layer's block exact."""
    for name, kind, part in (
        ("kronecker, nearest", "nearest", "hessian"),
        ("kronecker, expectation", "expectation", "hessian"),
        ("kronecker, K-FAC", "expectation", "ggn"),
    ):
        matrix = np.zeros_like(exact)
        matrix[25:35, 25:35] = exact[25:35, 25:35]
        order = np.concatenate([np.arange(30).reshape(5, 6)[:, :4].ravel(), np.arange(30).reshape(5, 6)[:, 4]])
        for layer, place in (("first", slice(0, 25)), ("last", slice(35, 50))):
            product = disthess.kronecker(problem(), layer, kind=kind, part=part).dense()  # type: ignore[arg-type]
            if layer == "first":
                order = np.concatenate([np.arange(25).reshape(5, 5)[:, :4].ravel(), np.arange(25).reshape(5, 5)[:, 4]])
                product = product[np.ix_(order, order)]
            matrix[place, place] = product
        check(row(found, name), exact, matrix)
    nearest, expected = row(found, "kronecker, nearest"), row(found, "kronecker, expectation")
    assert row(found, "block-diagonal").frobenius_error < nearest.frobenius_error < expected.frobenius_error
    assert nearest.stored_bytes == 8 * (25 + 25 + 9 + 25 + 100)


def test_what_a_problem_does_not_have_is_said() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten()).double()
    conv = disthess.Problem(
        model, objective=lambda m, x: m(x).square().mean(), batches=[torch.randn(5, 1, 3, 3).double()]
    )
    found = disthess.compare(conv, ranks=(2,))
    assert [line.split(":")[0] for line in found.left_out] == [
        "ggn", "kronecker, nearest", "kronecker, expectation", "kronecker, K-FAC",
    ]  # fmt: skip
    assert [entry.name for entry in found.rows] == [
        "exact",
        "block-diagonal",
        "diagonal",
        "low rank 2",
        "blocks of rank 2",
    ]
    assert row(found, "block-diagonal").frobenius_error < 1e-7


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="positive"):
        disthess.compare(problem(), ranks=(0,))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").touch()
    with pytest.raises(ConfigError, match="not empty"):
        disthess.compare(problem(), tmp_path / "old")
