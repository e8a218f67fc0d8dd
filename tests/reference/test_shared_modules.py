"""A module that the model reaches by several paths: right numbers, and the user's own tensors stay in their places."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import disthess
from disthess.swap import call_with


def model(norm: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    if not norm:
        shared = nn.Linear(4, 4)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), shared, nn.Tanh(), shared).double()
    shared, statistics = nn.Linear(4, 4), nn.BatchNorm1d(4)
    return nn.Sequential(nn.Linear(3, 4), statistics, nn.Tanh(), shared, statistics, nn.Tanh(), shared).double()


def problem(net: nn.Module) -> disthess.Problem:
    data = (torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64))
    return disthess.Problem(net, loss="mse", batches=[data])


def tensors(net: nn.Module) -> list[tuple[str, int, Tensor]]:
    """Every slot of every module, what it holds, and the values."""
    return [
        (f"{path}.{key}", id(value), value.detach().clone())
        for path, child in net.named_modules(remove_duplicate=False)
        for key, value in (*child._parameters.items(), *child._buffers.items())
        if value is not None
    ]


QUESTIONS: dict[str, Callable[[disthess.Problem, Path], Any]] = {
    "reference": lambda data, folder: disthess.reference_hessian(data),
    "graph": lambda data, folder: disthess.compute(data, folder / "g.zarr", progress=False),
    "autograd": lambda data, folder: disthess.compute(data, folder / "a.zarr", method="autograd", progress=False),
    "couplings": lambda data, folder: disthess.coupling_map(data, probes=4),
    "newton": lambda data, folder: disthess.newton(data, max_steps=2),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_users_tensors_stay_where_they_are(question: str, tmp_path: Path) -> None:
    net = model()
    before = tensors(net)
    QUESTIONS[question](problem(net), tmp_path)
    after = tensors(net)
    assert [entry[:2] for entry in after] == [entry[:2] for entry in before]
    for (name, _, old), (_, _, new) in zip(before, after, strict=True):
        assert torch.equal(old, new), name


@pytest.mark.parametrize("method", ["graph", "autograd"])
def test_the_hessian_is_certified_and_that_of_differences(method: str, tmp_path: Path) -> None:
    # Export cannot capture a batch norm in training mode that is passed twice.
    data = problem(model(norm=method == "autograd"))
    store = disthess.compute(data, tmp_path / "x.zarr", method=method, progress=False)
    assert store.certificate("hessian").passed
    names = [parameter.name for parameter in data.parameters()]
    leaves = [parameter.tensor for parameter in data.parameters()]
    rows, step = [], 1e-5
    inputs, targets = data.batches[0]

    def gradient() -> Tensor:
        found = torch.autograd.grad(nn.functional.mse_loss(data.model(inputs), targets), leaves)
        return torch.cat([entry.reshape(-1) for entry in found])

    for leaf in leaves:
        for place in range(leaf.numel()):
            pair = []
            for sign in (1, -1):
                leaf.data.view(-1)[place] += sign * step
                pair.append(gradient())
                leaf.data.view(-1)[place] -= sign * step
            rows.append((pair[0] - pair[1]) / (2 * step))
    wanted = torch.stack(rows).numpy()
    assert names == [parameter.name for parameter in store.parameters]
    assert np.abs(store.dense() - wanted).max() <= 1e-7 * np.abs(wanted).max()


def test_tied_tensors_are_replaced_everywhere() -> None:
    first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    second.weight = first.weight
    both = nn.Sequential(first, second, first)
    found = call_with(both, {"1.weight": 2 * torch.eye(2)}, (torch.ones(1, 2),))
    assert found.tolist() == [[8.0, 8.0]]
    assert first.weight is second.weight
