"""The recursions on captured problems: operation by operation, against the dense oracle and the engine's store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cases import Case, cases
from torch import nn

import disthess
from disthess.errors import PlanError
from disthess.formalism.capture import dag_of
from disthess.formalism.eliminate import eliminate
from disthess.formalism.local import differentiate
from disthess.formalism.paths import split_paths
from disthess.formalism.perturb import activation_hessian, parameter_hessian

TYPICAL = ("mlp_two_batches_sum", "rnn", "tied_autoencoder", "batch_norm_train", "two_heads", "hinge", "weight_decay")


@pytest.mark.parametrize("case", cases(TYPICAL, graph=True))
def test_all_methods_equal_the_oracle(case: Case) -> None:
    problem = case.make()
    local = differentiate(dag_of(problem))
    wanted = torch.from_numpy(disthess.reference_hessian(problem))
    split = split_paths(local)
    for found in (eliminate(local).hessian, parameter_hessian(local, activation_hessian(local)), split.hessian):
        assert (found - wanted).norm() <= 1e-10 * wanted.norm()
    if case.ggn:
        ggn = torch.from_numpy(disthess.reference_hessian(problem, "ggn"))
        assert (split.ggn - ggn).norm() <= 1e-10 * ggn.norm()
        nodes = disthess.node_curvature(problem, matrices=True).matrices
        scale = wanted.norm()
        for name, matrix in split.curvature.items():
            if name in nodes:
                assert (nodes[name] - matrix).norm() <= 1e-10 * scale, name


def test_activation_blocks_of_the_engine_are_those_of_the_formalism(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(3, 3).double(), torch.randn(3, 2).double()
    problem = disthess.Problem(model, loss="mse", batches=[(x, y)], weight_decay=0.1)
    store = disthess.compute(
        problem, tmp_path / "run.zarr", activations=["0", "1", "2"], activations_per_sample=True, progress=False
    )
    local = differentiate(dag_of(problem))
    blocks = activation_hessian(local)
    for v, p in (("0", 4), ("1", 4), ("2", 2)):
        for w, q in (("0", 4), ("1", 4), ("2", 2)):
            stacked = blocks[v, w].reshape(3, p, 3, q)
            wanted = np.stack([stacked[n, :, n].numpy() for n in range(3)])
            np.testing.assert_allclose(store.activation_block(v, w, per_sample=True), wanted, atol=1e-14)
    wanted_hessian = torch.from_numpy(disthess.reference_hessian(problem))
    assert (eliminate(local).hessian - wanted_hessian).norm() <= 1e-12


def test_large_problems_are_refused() -> None:
    model = nn.Linear(100, 20).double()
    problem = disthess.Problem(model, loss="mse", batches=[(torch.ones(2, 100), torch.ones(2, 20))])
    with pytest.raises(PlanError, match="small networks"):
        dag_of(problem)
