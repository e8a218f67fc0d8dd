"""Recorded products: of every kind of model against the dense Hessian; fallbacks say why; recordings replay and are checked."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from cases import Case, cases
from torch import Tensor, nn

import disthess
from disthess import matrixfree
from disthess.errors import GraphError
from disthess.matrixfree import HessianOperator
from disthess.sweep.flat import FlatProducts
from disthess.sweep.fuse import fuse
from disthess.sweep.record import record
from disthess.sweep.replay import player

TYPICAL = (
    "mlp_skip_gate",
    "mlp_two_batches_sum",
    "cnn_relu_max_pool",
    "rnn",
    "attention",
    "tied_language_model",
    "batch_norm_train",
    "two_heads",
    "weight_decay",
    "group_norm",
    "mixture_top2",
)


def operator_of(problem: disthess.Problem, names: list[str] | None = None) -> HessianOperator:
    chosen = [it for it in problem.parameters() if names is None or it.name in names]
    return HessianOperator(problem, [it.name for it in chosen], sum(it.tensor.numel() for it in chosen))


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 1e-14))


@pytest.mark.parametrize("case", cases(TYPICAL, graph=True))
def test_every_way_gives_the_dense_hessians_products(case: Case) -> None:
    problem = case.make()
    operator = operator_of(problem)
    assert operator.method == "sweep", operator.reason
    block = np.random.default_rng(0).standard_normal((problem.numel, 11))
    wanted = disthess.reference_hessian(problem) @ block
    assert relative(operator.matmat(block), wanted) < 1e-10
    for way in ("sweep", "tape", "batched tape"):
        operator._ways = dict.fromkeys(matrixfree.CHUNKS, way)
        assert relative(operator.matmat(block), wanted) < 1e-10, way


def test_frozen_parameters_and_chosen_ones() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model[2].weight.requires_grad_(False)
    data = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    problem = disthess.Problem(model, loss="mse", batches=[data, data], weights=[0.5, 2.0], weight_decay={"4.*": 0.3})
    dense = disthess.reference_hessian(problem)
    block = np.random.default_rng(1).standard_normal((problem.numel, 3))
    operator = operator_of(problem)
    assert operator.method == "sweep"
    assert relative(operator.matmat(block), dense @ block) < 1e-10
    names = [it.name for it in problem.parameters()]
    sizes = np.array([it.tensor.numel() for it in problem.parameters()])
    chosen = ["0.bias", "4.weight"]
    where = np.repeat([name in chosen for name in names], sizes)
    part = operator_of(problem, chosen)
    wanted = dense[np.ix_(where, where)] @ block[: where.sum()]
    assert relative(part.matmat(block[: where.sum()]), wanted) < 1e-10


def test_the_point_is_kept_when_the_model_moves_on() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    data = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)
    problem = disthess.Problem(model, loss="mse", batches=[data])
    operator, dense = operator_of(problem), disthess.reference_hessian(problem)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    for count in (1, 8):
        block = np.random.default_rng(count).standard_normal((problem.numel, count))
        assert relative(operator.matmat(block), dense @ block) < 1e-10
    assert relative(dense, disthess.reference_hessian(problem)) > 1e-2


def branching() -> disthess.Problem:
    torch.manual_seed(0)
    model = nn.Linear(2, 1).double()

    def objective(model: nn.Module, batch: Tensor) -> Tensor:
        out = model(batch)
        return out.pow(4).sum() if float(out.detach().sum()) > -1e9 else out.sum()

    return disthess.Problem(model, objective=objective, batches=[torch.randn(4, 2, dtype=torch.float64)])


def test_what_cannot_be_captured_is_taped() -> None:
    problem = branching()
    operator = operator_of(problem)
    assert operator.method == "tape"
    assert "captured" in operator.reason
    block = np.eye(problem.numel)
    assert relative(operator.matmat(block), disthess.reference_hessian(problem)) < 1e-10


@pytest.mark.parametrize("factor", [1 + 1e-6, float("nan")])
def test_a_wrong_sweep_is_not_used(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    right: Callable[..., Tensor] = FlatProducts.products
    monkeypatch.setattr(FlatProducts, "products", lambda self, vectors: right(self, vectors) * factor)
    problem = cases(("mlp_two_batches_sum",), graph=True)[0].values[0].make()
    operator = operator_of(problem)
    assert operator.method == "tape"
    assert "differ" in operator.reason
    block = np.eye(problem.numel)
    assert relative(operator.matmat(block), disthess.reference_hessian(problem)) < 1e-10


def test_large_models_are_taped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrixfree, "SWEEP_NUMEL", 10)
    problem = cases(("mlp_two_batches_sum",), graph=True)[0].values[0].make()
    operator = operator_of(problem)
    block = np.eye(problem.numel)
    assert relative(operator.matmat(block), disthess.reference_hessian(problem)) < 1e-10
    assert operator.method == "tape"
    assert set(operator.ways.values()) == {"tape"}


def test_recordings_replay_on_other_values() -> None:
    held = torch.randn(6, dtype=torch.float64)
    weight = torch.randn(6, 3, dtype=torch.float64)

    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        level = torch.softmax(held, 0)
        centred = level * (x - (level * x).sum(-1, keepdim=True))
        written = x.new_zeros(4, 6)
        written.select(0, 1).copy_(y[0])
        total = x @ weight + y @ weight
        return centred + x * y, total - x[:, :3] * y[:, 3:], written * 2, (y + 1) * (y + 1), held

    def pair(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(2)]

    recording = record(function, pair(0))
    short = fuse(recording)
    assert len(short.instructions) < len(recording.instructions)
    assert any(it.name == "aten._softmax_backward_data.default" for it in short.instructions)
    for made in (recording, short):
        given = pair(1)
        kept = [tensor.clone() for tensor in given]
        for found, wanted in zip(player(made)(*given), function(*given), strict=True):
            assert torch.allclose(found, wanted, rtol=1e-13, atol=1e-13)
        assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, kept, strict=True))


def test_what_depends_on_entries_is_not_recorded() -> None:
    held = torch.zeros(2)
    with pytest.raises(GraphError, match="reads entries"):
        record(lambda x: (x * float(x.sum()),), [torch.ones(2)])
    with pytest.raises(GraphError, match="writes into"):
        record(lambda x: (held.add_(x),), [torch.ones(2)])
