"""The split of the residual over nodes: it sums to the residual, and each term is what linearising that node takes away."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import CASES, Case, cases
from torch import Tensor, nn

import disthess
from disthess.errors import GraphError, PlanError
from disthess.sweep import curvature

TYPICAL = ("mlp_skip_gate", "attention", "batch_norm_train", "tied_language_model", "weight_decay")


@pytest.mark.parametrize("case", cases(TYPICAL, graph=True))
def test_nodes_sum_to_the_residual(case: Case) -> None:
    problem = case.make()
    found = disthess.node_curvature(problem, matrices=True)
    part = "residual" if case.ggn else "hessian"
    assert found.part == part
    wanted = disthess.reference_hessian(problem, part)
    summed = sum(found.matrices.values()).numpy()  # type: ignore[union-attr]
    assert np.linalg.norm(summed - wanted) <= 1e-10 * np.linalg.norm(wanted)
    if case.ggn:
        whole = disthess.reference_hessian(problem)
        ggn = disthess.reference_hessian(problem, "ggn")
        assert np.linalg.norm(ggn + summed - whole) <= 1e-10 * np.linalg.norm(whole)
    assert found.defect <= 1e-10
    assert sum(row.share for row in found.rows) == pytest.approx(1.0, abs=1e-9)
    assert sum(row.trace for row in found.rows) == pytest.approx(np.trace(wanted), abs=1e-10)
    for row in found.rows:
        matrix = found.matrices[row.name].numpy()
        np.testing.assert_allclose(matrix, matrix.T, atol=1e-13)
        assert row.norm == pytest.approx(np.linalg.norm(matrix))


class Net(nn.Module):
    """Any of its two activations can be replaced by its tangent at the point where it stands."""

    def __init__(self, straight: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.fc3 = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 2)
        self.first, self.second = nn.Tanh(), nn.Sigmoid()
        self.straight = straight

    def forward(self, x: Tensor) -> Tensor:
        z = self.fc1(x)
        h = _tangent(torch.tanh, z) if self.straight == "first" else self.first(z)
        z = self.fc2(h)
        h = _tangent(torch.sigmoid, z) if self.straight == "second" else self.second(z)
        return self.fc3(h)


def _tangent(function, z):  # type: ignore[no-untyped-def]
    fixed = z.detach()
    value, slope = torch.func.jvp(function, (fixed,), (torch.ones_like(fixed),))
    return value + slope * (z - fixed)


def problem_of(straight: str = "") -> disthess.Problem:
    g = torch.Generator().manual_seed(5)
    x, y = torch.randn(6, 3, generator=g).double(), torch.randn(6, 2, generator=g).double()
    return disthess.Problem(Net(straight).double(), loss="mse", batches=[(x, y)])


@pytest.mark.parametrize("name", ["first", "second"])
def test_a_node_is_what_its_tangent_takes_away(name: str) -> None:
    found = disthess.node_curvature(problem_of(), matrices=True)
    wanted = disthess.reference_hessian(problem_of()) - disthess.reference_hessian(problem_of(name))
    np.testing.assert_allclose(found.matrices[name].numpy(), wanted, atol=1e-14)


def test_groups_of_nodes_and_of_samples_do_not_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = disthess.node_curvature(problem_of())
    monkeypatch.setattr(curvature, "MATRIX_BYTES", 1)
    monkeypatch.setattr(curvature, "TANGENT_BYTES", 1)
    pieces = disthess.node_curvature(problem_of())
    assert [row.name for row in pieces.rows] == [row.name for row in whole.rows]
    for one, other in zip(pieces.rows, whole.rows, strict=True):
        assert one.norm == pytest.approx(other.norm, rel=1e-12)
        assert one.share == pytest.approx(other.share, rel=1e-9)
    assert not whole.matrices


def test_relu_contributes_nothing_and_selections_are_understood() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    x, y = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    problem = disthess.Problem(model, loss="mse", batches=[(x, y)])
    assert [row.name for row in disthess.node_curvature(problem).rows] == ["2"]
    alone = disthess.node_curvature(problem, parameters="2.*")
    assert alone.rows == ()
    assert alone.total_norm == 0.0
    assert not math.isnan(alone.defect)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    branching = next(case for case in CASES if not case.graph).make()
    with pytest.raises(GraphError):
        disthess.node_curvature(branching)
    monkeypatch.setattr("disthess.bend.available_memory_bytes", lambda: 1000)
    with pytest.raises(PlanError, match="Select fewer parameters"):
        disthess.node_curvature(problem_of())
