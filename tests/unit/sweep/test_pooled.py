"""Layers whose outputs are pooled: tangents start behind the pooling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from swept import ATOL, check_halved, check_parts, check_small_tiles
from torch import Tensor, nn
from torch.nn import functional as F

import disthess
from disthess.graph.waves import leading_to, source_leaves
from disthess.prepare import Options, Prepared, prepare
from disthess.sweep.frame import Frame
from disthess.sweep.outputs import shortcut_of
from disthess.sweep.pooled import Pooling
from disthess.sweep.primal import compute_primals
from disthess.types import Span


class Centred(nn.Module):
    """A convolution, pooled, whose samples then move each other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Conv1d(2, 3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 2, T]`` to ``[N, 2]``."""
        h = torch.tanh(self.layer(x)).mean(2)
        return self.head((h - h.mean(0)).exp())


class Words(nn.Module):
    """A dense layer of every word, averaged, with a weight used before and after."""

    def __init__(self, *, before: bool = False) -> None:
        super().__init__()
        self.first, self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 6), nn.Linear(6, 3)
        self.before = before

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, 4]`` to ``[N, 3]``."""
        rows = torch.tanh(self.first(x))
        pooled = F.silu(self.layer(rows)).mean(1)
        late = self.first(pooled[:, :4]) if self.before else pooled[:, :4]
        return self.head(torch.cat([late, pooled[:, 4:]], 1))


class Scaled(nn.Module):
    """A scale along the last axis, and a shift, used twice."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(size)), nn.Parameter(torch.randn(size))

    def forward(self, x: Tensor) -> Tensor:
        """As large as it came."""
        return self.shift - torch.tanh(x * self.scale - self.shift) * self.scale


def normalised(layer: nn.BatchNorm2d) -> nn.Module:
    """In evaluation, with statistics and parameters of a trained one."""
    with torch.no_grad():
        for value in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            assert value is not None
            value.copy_(torch.rand_like(value) + 0.5)
    return layer.eval()


class Skip(nn.Module):
    """A convolution that is read by two: pooled, and not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Conv1d(1, 2, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 1, 5]`` to ``[N, 2]``."""
        z = torch.tanh(self.layer(x))
        return self.head(torch.cat([z.flatten(1), z.mean(2)], 1))


class Rows(nn.Module):
    """The mean over rows."""

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, D]`` to ``[N, D]``."""
        return x.mean(1)


def net(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


Made = tuple[Callable[[], nn.Module], tuple[int, ...], int, dict[str, int]]

NETS: dict[str, Made] = {
    "maxima": (
        lambda: net(
            nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(),
            nn.Flatten(), nn.Linear(4, 3),
        ),
        (1, 4, 4), 3, {"0.weight": 4, "3.weight": 1},
    ),
    "bent": (
        lambda: net(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.AvgPool2d(2), nn.Softplus(), nn.Flatten(), nn.Linear(12, 3)),
        (2, 5, 5), 3, {"0.weight": 4},
    ),
    "bent_behind": (
        lambda: net(nn.Conv1d(2, 3, 2, bias=False), nn.MaxPool1d(2), nn.GELU(), nn.AvgPool1d(2), nn.Sigmoid(), nn.Flatten()),
        (2, 9), 6, {"0.weight": 2},
    ),
    "global": (
        lambda: net(nn.Conv2d(2, 5, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)),
        (2, 5, 4), 3, {"0.weight": 1},
    ),
    "volume": (
        lambda: net(nn.Conv3d(1, 2, 2), nn.ELU(), nn.AvgPool3d(2), nn.Flatten(), nn.Linear(2, 2)),
        (1, 3, 3, 3), 2, {"0.weight": 1},
    ),
    "overlapping": (
        lambda: net(nn.Conv1d(1, 3, 2), nn.ReLU(), nn.MaxPool1d(3, stride=1), nn.Tanh(), nn.Flatten(), nn.Linear(9, 2)),
        (1, 6), 2, {"0.weight": 3},
    ),
    "normalised": (
        lambda: net(
            nn.Conv2d(1, 3, 2, bias=False), normalised(nn.BatchNorm2d(3)), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 1),
            nn.GELU(), normalised(nn.BatchNorm2d(2)), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(2, 2),
        ),
        (1, 5, 5), 2, {"0.weight": 4, "4.weight": 1},
    ),
    "scaled": (lambda: net(nn.Linear(3, 4), Scaled(4), Rows(), nn.Linear(4, 2)), (5, 3), 2, {"0.weight": 1}),
    "words": (Words, (3, 4), 3, {"layer.weight": 1}),
    "centred": (Centred, (2, 6), 2, {"layer.weight": 5}),
}  # fmt: skip
"""How to make each, the shape of a sample, classes, and places of pooled weights."""


def problem(name: str, sizes: tuple[int, ...] = (5, 5)) -> disthess.Problem:
    make, shape, outputs, _ = NETS[name]
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = make().double()
        batches = [(torch.randn(size, *shape).double(), torch.randint(outputs, (size,))) for size in sizes]
    return disthess.Problem(model, loss="cross_entropy", batches=batches)


def pooling(prepared: Prepared, name: str, batch: int = 0) -> Pooling | None:
    """What a weight's sweep starts behind on a batch, all later parameters wanted."""
    primal = compute_primals(prepared.problem, prepared.programs)[batch]
    ranks = {spec.name: spec.rank for spec in prepared.plan.layout.parameters}
    leaves = source_leaves(primal.graph, name, name)
    uses = [node for node in primal.graph.nodes if node.kind == "use" and node.live]
    wanted = [node.index for node in uses if ranks[node.op] >= ranks[name]]
    return shortcut_of(Frame(primal, Span(0, primal.samples)), leaves, leading_to(primal.graph, wanted)).pooling


@pytest.mark.parametrize("name", NETS)
def test_tangents_start_behind_the_pooling_and_the_hessian_is_right(name: str, tmp_path: Path) -> None:
    made = problem(name)
    prepared = prepare(made, Options(basis="output"))
    for weight, places in NETS[name][3].items():
        found = pooling(prepared, weight)
        assert found is not None
        assert found.places == places
    check_parts(made, tmp_path)


@pytest.mark.parametrize("name", NETS)
def test_small_tiles_and_stacks_agree(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_small_tiles(problem(name), tmp_path, monkeypatch, 1_000)


@pytest.mark.parametrize("name", ["maxima", "bent_behind", "centred"])
def test_less_memory_gives_the_same_rows(name: str) -> None:
    check_halved(problem(name))


@pytest.mark.parametrize("shared", ["sum", "uses"])
def test_a_weight_used_before_and_behind_the_pooling(shared: str, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        batches = [(torch.randn(5, words, 4).double(), torch.randint(3, (5,))) for words in (3, 3)]
        made = disthess.Problem(Words(before=True).double(), loss="cross_entropy", batches=batches)
    found = pooling(prepare(made, Options(basis="output")), "layer.weight")
    assert found is not None
    store = disthess.compute(made, tmp_path / "x.zarr", basis="output", shared=shared)
    np.testing.assert_allclose(store.dense(), disthess.reference_hessian(made), atol=ATOL)


def test_batches_may_pool_as_many_rows_as_they_have(tmp_path: Path) -> None:
    """One row a sample is pooled to one: nothing is gained there, and tangents start at the layer."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        batches = [(torch.randn(5, words, 4).double(), torch.randint(3, (5,))) for words in (3, 1, 2)]
        made = disthess.Problem(Words().double(), loss="cross_entropy", batches=batches)
    prepared = prepare(made, Options(basis="output"))
    assert [pooling(prepared, "layer.weight", batch) is not None for batch in range(3)] == [True, False, True]
    store = disthess.compute(made, tmp_path / "x.zarr", basis="output")
    np.testing.assert_allclose(store.dense(), disthess.reference_hessian(made), atol=ATOL)


class EitherWay(nn.Module):
    """Two layers of every word, the order of which depends on the batch, and a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, 4]`` to ``[N, 3]``; of an even T the other way round."""
        for layer in (self.first, self.second) if x.shape[1] % 2 else (self.second, self.first):
            x = torch.tanh(layer(x))
        return self.head(x.mean(1))


def test_targets_before_the_layer_are_reached_from_the_layer_itself(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        batches = [(torch.randn(5, words, 4).double(), torch.randint(3, (5,))) for words in (3, 4)]
        made = disthess.Problem(EitherWay().double(), loss="cross_entropy", batches=batches)
    prepared = prepare(made, Options(basis="output"))
    assert [pooling(prepared, "first.weight", batch) for batch in range(2)] == [None, None]
    assert pooling(prepared, "second.weight", 0) is not None
    store = disthess.compute(made, tmp_path / "x.zarr", basis="output", method="graph")
    np.testing.assert_allclose(store.dense(), disthess.reference_hessian(made), atol=ATOL)


NOT_POOLED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "read by two": (Skip, (1, 5)),
    "scaled place by place": (lambda: net(nn.Conv1d(1, 2, 3), Scaled(2), nn.AvgPool1d(2), nn.Flatten()), (1, 4)),
    "normalised over channels": (
        lambda: net(nn.Conv1d(1, 2, 3), nn.LayerNorm(2), nn.AvgPool1d(2), nn.Flatten()),
        (1, 4),
    ),
    "over channels": (lambda: net(nn.Linear(3, 4), nn.AvgPool1d(2)), (2, 3)),
    "as many": (lambda: net(nn.Conv1d(1, 2, 2), nn.Tanh(), nn.MaxPool1d(1), nn.Flatten()), (1, 3)),
}


@pytest.mark.parametrize("name", NOT_POOLED)
def test_what_is_no_pooling_of_channels_starts_at_the_layer(name: str, tmp_path: Path) -> None:
    make, shape = NOT_POOLED[name]
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = make().double()
        inputs = torch.randn(5, *shape).double()
        made = disthess.Problem(model, loss="mse", batches=[(inputs, torch.randn_like(model(inputs)))])
    prepared = prepare(made, Options(basis="output"))
    weight = next(spec.name for spec in prepared.plan.layout.parameters if spec.name.endswith("weight"))
    assert pooling(prepared, weight) is None
    store = disthess.compute(made, tmp_path / "x.zarr", basis="output")
    np.testing.assert_allclose(store.dense(), disthess.reference_hessian(made), atol=ATOL)
