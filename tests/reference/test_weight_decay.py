"""Weight decay: a diagonal term, in the hessian and ggn parts, in every reader; against the penalty written into the objective."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cases import CASES
from torch import Tensor, nn

import disthess
from disthess.errors import ConfigError


class Spare(nn.Module):
    """One layer is never used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.spare, self.b = nn.Linear(3, 4), nn.Linear(2, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(5, 3, generator=g).double(), torch.randn(5, 2, generator=g).double()


DECAY = {"*": 0.3, "b.*": 0.0, "a.bias": 1.5}


def penalised(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    penalty = sum(
        0.5 * (1.5 if name == "a.bias" else 0.3) * p.square().sum()
        for name, p in model.named_parameters()
        if not name.startswith("b.")
    )
    return nn.functional.mse_loss(model(batch[0]), batch[1]) + penalty


@pytest.mark.parametrize("method", ["graph", "autograd"])
def test_equals_the_penalty_written_out(method: str, tmp_path: Path) -> None:
    model = Spare().double()
    problem = disthess.Problem(model, loss="mse", batches=[data()], weight_decay=DECAY)
    written = disthess.Problem(model, objective=penalised, batches=[data()])
    store = disthess.compute(problem, tmp_path / "run.zarr", parts=("hessian", "ggn"), method=method, progress=False)
    wanted = disthess.reference_hessian(written)
    np.testing.assert_allclose(store.dense(), wanted, atol=1e-12)
    np.testing.assert_allclose(store.dask().compute(), wanted, atol=1e-12)
    np.testing.assert_allclose(store.operator() @ np.eye(store.numel), wanted, atol=1e-12)
    np.testing.assert_allclose(store.blocks().trace, np.trace(wanted), atol=1e-12)
    np.testing.assert_allclose(store.blocks().frobenius, np.linalg.norm(wanted), atol=1e-12)
    np.testing.assert_allclose(disthess.reference_hessian(problem), wanted, atol=1e-12)
    names = [parameter.name for parameter in problem.parameters()]
    assert store.loss == pytest.approx(float(penalised(model, data()).detach()), abs=1e-13)
    np.testing.assert_allclose(
        store.gradient,
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(penalised(model, data()), model.parameters())]).numpy(),
        atol=1e-13,
    )
    np.testing.assert_allclose(store.block("spare.weight", "spare.weight"), 0.3 * np.eye(4))
    bare = disthess.Problem(model, loss="mse", batches=[data()])
    np.testing.assert_allclose(store.dense("ggn"), disthess.reference_hessian(problem, "ggn"), atol=1e-12)
    diagonal = np.concatenate(
        [np.full(p.numel(), DECAY.get(n, 0.0 if n.startswith("b.") else 0.3)) for n, p in model.named_parameters()]
    )
    difference = store.dense("ggn") - disthess.reference_hessian(bare, "ggn")
    np.testing.assert_allclose(difference, np.diag(diagonal), atol=1e-12)
    np.testing.assert_allclose(store.dense("residual"), disthess.reference_hessian(bare, "residual"), atol=1e-12)
    assert names == [spec.name for spec in store.parameters]


@pytest.mark.parametrize("shared", ["uses", "sum"])
def test_shared_parameters_decay_once(shared: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "tied_autoencoder")
    plain, problem = case.make(), case.make()
    problem = disthess.Problem(problem.model, loss="mse", batches=problem.batches, weight_decay=0.7)
    store = disthess.compute(problem, tmp_path / "run.zarr", shared=shared, progress=False)
    wanted = disthess.reference_hessian(plain) + 0.7 * np.eye(plain.numel)
    np.testing.assert_allclose(store.dense(), wanted, atol=1e-12)


def test_another_decay_is_another_problem(tmp_path: Path) -> None:
    model = Spare().double()
    disthess.compute(disthess.Problem(model, loss="mse", batches=[data()]), tmp_path / "run.zarr", progress=False)
    decayed = disthess.Problem(model, loss="mse", batches=[data()], weight_decay=1e-2)
    with pytest.raises(disthess.errors.StoreError, match="weight decay"):
        disthess.compute(decayed, tmp_path / "run.zarr", progress=False)


def test_wrong_decays_are_refused() -> None:
    for wrong in ("much", {"c.*": 0.1}, float("nan"), {"a.*": None}):
        with pytest.raises(ConfigError, match="weight_decay"):
            disthess.Problem(Spare(), loss="mse", batches=[data()], weight_decay=wrong)  # type: ignore[arg-type]
