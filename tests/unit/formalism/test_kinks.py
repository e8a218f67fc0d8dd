"""Every operation that has a kink reports it at a tie, and not beside it; runs say so."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import disthess
from disthess.formalism.candidates import candidates
from disthess.graph.ir import Node

Function = Callable[[Tensor], Tensor]

# The function of a [4, 4] input, and an input entry (or two equal ones) that ties it.
TIES: dict[str, tuple[Function, list[float]]] = {
    "relu": (torch.relu, [0.0]),
    "relu6": (F.relu6, [6.0]),
    "abs": (torch.abs, [0.0]),
    "leaky_relu": (F.leaky_relu, [0.0]),
    "clamp": (lambda x: x.clamp(-1.5, 1.5), [1.5]),
    "clamp_min": (lambda x: torch.clamp_min(x, 0.25), [0.25]),
    "hardtanh": (F.hardtanh, [-1.0]),
    "threshold": (lambda x: F.threshold(x, 0.1, 20.0), [0.1]),
    "softshrink": (F.softshrink, [0.5]),
    "hardshrink": (F.hardshrink, [-0.5]),
    "hardswish": (F.hardswish, [3.0]),
    "hardsigmoid": (F.hardsigmoid, [-3.0]),
    "elu": (F.elu, [0.0]),
    "celu": (F.celu, [0.0]),
    "selu": (F.selu, [0.0]),
    "prelu": (lambda x: F.prelu(x, torch.tensor([0.25], dtype=x.dtype)), [0.0]),
    "smooth_l1": (lambda x: F.smooth_l1_loss(x, torch.zeros_like(x)), [1.0]),
    "huber": (lambda x: F.huber_loss(x, torch.zeros_like(x), delta=0.7), [-0.7]),
    "hinge_embedding": (lambda x: F.hinge_embedding_loss(x, -torch.ones_like(x)), [1.0]),
    "where": (lambda x: torch.where(x > 0.3, x, 2 * x), [0.3]),
    "maximum": (lambda x: torch.maximum(x, x.flip(1)), [0.7, 0.7]),
    "amax": (lambda x: x.amax(1), [9.0, 9.0]),
    "min": (lambda x: x.min(1).values, [-9.0, -9.0]),
    "max_pool1d": (lambda x: F.max_pool1d(x.unsqueeze(1), 2), [9.0, 9.0]),
    "max_pool2d": (lambda x: F.max_pool2d(x.reshape(4, 1, 2, 2), 2), [9.0, 9.0]),
    "adaptive_max_pool1d": (lambda x: F.adaptive_max_pool1d(x.unsqueeze(1), 3), [9.0, 9.0]),
    "sort": (lambda x: x.sort(1).values, [0.4, 0.4]),
    "topk": (lambda x: x.topk(2, 1).values, [9.0, 9.0]),
    "median": (lambda x: x.median(1).values, [0.4, 0.4]),
    "one_norm": (lambda x: x.norm(p=1, dim=1), [0.0]),
}


def tied(values: list[float]) -> Tensor:
    x = torch.linspace(-1.93, 2.11, 16, dtype=torch.float64).reshape(4, 4)[:, torch.tensor([2, 0, 3, 1])].clone()
    x[1, 0] = values[0]
    if len(values) > 1:
        # The far end is compared with the first; neighbours lie in one pooling window.
        x[1, 1], x[1, 3] = values[1], values[1]
    return x


class Moved(nn.Module):
    """The parameters are the input itself, so that every tie comes apart."""

    def __init__(self, function: Function, start: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(start)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.w * x)


def problem_of(function: Function, start: Tensor) -> disthess.Problem:
    return disthess.Problem(
        Moved(function, start),
        objective=lambda m, x: (m(x) ** 2).sum(),
        batches=[torch.ones(4, 4, dtype=torch.float64)],
    )


@pytest.mark.parametrize("name", TIES)
def test_a_tie_has_two_pieces_and_its_neighbourhood_one(name: str) -> None:
    function, values = TIES[name]
    at = disthess.clarke_hessian(problem_of(function, tied(values)))
    assert at.units
    assert len(at.patterns) >= 2
    beside = tied(values)
    beside += 1e-4 * torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(4, 4)
    off = disthess.clarke_hessian(problem_of(function, beside))
    assert not off.units
    if name == "hardsigmoid":  # torch's own kernel has no second derivative; the captured graph's has
        assert math.isnan(off.torch_distance)
    else:
        np.testing.assert_allclose(off.matrix, disthess.reference_hessian(problem_of(function, beside)), atol=1e-10)
    # One of the pieces is the Hessian beside the tie, up to how far that is.
    distance = np.abs(at.hessians - off.matrix).reshape(len(at.hessians), -1).max(1).min()
    assert distance <= 2e-2


def test_runs_report_kinks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    with torch.no_grad():
        model[0].bias[1] = 0.0
    x = torch.tensor([[0.0, 0.0], [1.0, 0.5], [0.0, 0.0]], dtype=torch.float64)
    problem = disthess.Problem(model, loss="mse", batches=[(x, torch.zeros(3, 1).double())])
    store = disthess.compute(problem, tmp_path / "a.zarr", progress=False)
    assert store.kinks is not None
    (kink,) = store.kinks
    assert (kink["op"], kink["entries"], kink["samples"]) == ("aten.relu.default", 2, 2)
    assert kink["torch_takes"] == "slope 0"
    smooth = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    other = disthess.Problem(smooth, loss="mse", batches=[(x, torch.zeros(3, 1).double())])
    assert disthess.compute(other, tmp_path / "b.zarr", progress=False).kinks == []


POOLS: dict[str, tuple[Function, tuple[int, ...], str, tuple[object, ...]]] = {
    "padded": (lambda x: F.max_pool2d(x, 3, 2, 1), (2, 2, 5, 6), "aten.max_pool2d.default", ((3, 3), (2, 2), (1, 1))),
    "dilated": (lambda x: F.max_pool2d(x, 2, 1, 0, 2), (1, 2, 5, 5), "aten.max_pool2d.default", ((2, 2), (1, 1), (0, 0), (2, 2))),
    "ceil": (lambda x: F.max_pool1d(x, 3, 2, 1, 1, True), (2, 2, 6), "aten.max_pool1d.default", ((3,), (2,), (1,), (1,), True)),
    "three": (lambda x: F.max_pool3d(x, 2), (1, 2, 4, 4, 2), "aten.max_pool3d.default", ((2, 2, 2),)),
    "adaptive": (lambda x: F.adaptive_max_pool2d(x, (2, 3)), (2, 1, 5, 7), "aten.adaptive_max_pool2d.default", ((2, 3),)),
    "axes": (lambda x: x.amax((0, 2)), (3, 4, 2), "aten.amax.default", ((0, 2),)),
}  # fmt: skip


@pytest.mark.parametrize("name", POOLS)
def test_candidates_are_what_torch_takes_the_maximum_of(name: str) -> None:
    function, shape, op, args = POOLS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    node = Node(1, "pool", "op", op, (None, *args), (), None, (), "float64")
    padded = torch.cat([x.reshape(-1), torch.tensor([-torch.inf], dtype=torch.float64)])
    found = padded[candidates(node, shape)].amax(1)
    torch.testing.assert_close(found, function(x).reshape(-1), rtol=0, atol=0)
