"""What a plan projects against what a run does: matrix products by torch's own FLOP counter, bytes by the file system."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Attention, BatchNormNet, Lstm, UnrolledRnn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import disthess
from disthess.planning import memory, tiling
from disthess.prepare import Options, Prepared, prepare
from disthess.problem import Problem
from disthess.sweep import panel, rows
from disthess.sweep.engine import GraphEngine
from disthess.sweep.primal import compute_primals

TOLERANCE = 0.01
"""Counted products differ from the plan's by no more; in fact they are equal."""


class Gated(nn.Module):
    """Two inputs, a residual branch, a multiplicative gate."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 8), nn.Linear(4, 8)
        self.inner, self.gate, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = F.silu(self.left(x)) + torch.tanh(self.right(y))
        return self.out(h + self.inner(h) * torch.sigmoid(self.gate(h)))


class UpDown(nn.Module):
    """Grouped, depthwise and transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.depth = nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(4, 2, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.tanh(self.depth(F.avg_pool2d(F.gelu(self.down(x)), 2))))


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _classes(count: int, *shape: int) -> Tensor:
    return torch.randint(count, shape)


def _problem(model: nn.Module, loss: str, *batches: Any) -> Problem:
    return Problem(model.double(), loss=loss, batches=list(batches))


def mlp() -> Problem:
    net = nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 4))
    return _problem(net, "cross_entropy", (_normal(40, 9), _classes(4, 40)))


def cnn() -> Problem:
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3), nn.GELU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    return _problem(net, "cross_entropy", (_normal(10, 1, 8, 8), _classes(3, 10)))


def rnn() -> Problem:
    return _problem(UnrolledRnn(5), "mse", (_normal(8, 5, 2), _normal(8, 2)))


class Elman(nn.Module):
    """Three steps, the weight of which is wider than they are many."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.again = nn.Linear(6, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.tanh(self.enter(x[:, 0]))
        for step in range(1, x.shape[1]):
            state = torch.tanh(self.enter(x[:, step]) + self.again(state))
        return state


def elman() -> Problem:
    return _problem(Elman(), "mse", (_normal(9, 4, 6), _normal(9, 8)))


def transformer() -> Problem:
    return _problem(Attention(11, 6, 5), "cross_entropy", (_classes(11, 6, 5), _classes(11, 6, 5)))


def tables() -> Problem:
    """Long tables of which samples read few rows, in batches of three sizes, one of a single sample."""
    batches = [(_classes(40, n, length), _classes(40, n, length)) for n, length in ((9, 5), (6, 5), (1, 5))]
    return _problem(Attention(40, 6, 5), "cross_entropy", *batches)


def gated() -> Problem:
    data = ({"x": _normal(16, 6), "y": _normal(16, 4)}, _normal(16, 3))
    return _problem(Gated(), "mse", data)


class Pooled(nn.Module):
    """Layers that meet three rows a sample, and then one that meets their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 5), nn.Linear(5, 7), nn.Linear(7, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.sigmoid(self.first(x)))).mean(1))


def pooled() -> Problem:
    return _problem(Pooled(), "cross_entropy", (_normal(8, 3, 6), _classes(9, 8)))


def normalised() -> Problem:
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.Tanh(), nn.BatchNorm2d(4),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    return _problem(net.eval(), "cross_entropy", (_normal(10, 1, 8, 8), _classes(3, 10)))


def batch_norm() -> Problem:
    return _problem(BatchNormNet().train(), "cross_entropy", (_normal(12, 3), _classes(2, 12)))


def up_down() -> Problem:
    return _problem(UpDown(), "mse", (_normal(4, 2, 4, 4), _normal(4, 2, 4, 4)))


def lstm() -> Problem:
    return _problem(Lstm(), "mse", (_normal(5, 3, 2), _normal(5, 2)))


def unequal_batches() -> Problem:
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    return _problem(net, "cross_entropy", *((_normal(size, 5), _classes(3, size)) for size in (70, 64, 10)))


ALL = {"parts": ("hessian", "ggn", "residual")}
RUNS: tuple[tuple[Callable[[], Problem], dict[str, Any]], ...] = (
    *((make, {}) for make in (mlp, cnn, rnn, transformer, tables, gated, batch_norm, up_down, lstm, unequal_batches)),
    (rnn, {"shared": "uses"}), (rnn, {"shared": "sum"}), (cnn, ALL), (gated, ALL), (gated, {"basis": "parameter"}),
    (transformer, {"basis": "output"}), (cnn, {"basis": "output", **ALL}), (rnn, {"basis": "output", **ALL}),
    (lstm, {"basis": "output"}), (pooled, {}), (pooled, {"basis": "output", **ALL}),
    (normalised, {}), (normalised, {"basis": "output", **ALL}),
    (mlp, {"activations": "*", "parameters": "4.bias"}), (mlp, {"parameters": ["0.*", "4.*"]}),
)  # fmt: skip
IDS = [make.__name__ + "".join(f"-{key}={value}" for key, value in options.items()) for make, options in RUNS]


def made(make: Callable[[], Problem], options: dict[str, Any]) -> Prepared:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return prepare(make(), Options(**options))


def counted_flops(prepared: Prepared) -> list[int]:
    """What torch's counter sees of every tile, captured and differentiated once before."""
    parameters = {parameter.name: parameter.tensor.detach() for parameter in prepared.problem.parameters()}
    primals = compute_primals(prepared.problem, prepared.programs)
    plan = prepared.plan
    engine = GraphEngine(primals, parameters, plan.layout, {source.source: source for source in plan.sources})
    found = []
    for tile in plan.layout.tiles:
        with FlopCounterMode(display=False) as counter:
            engine.compute(tile.source, tile.span)
        found.append(counter.get_total_flops())
    return found


def close(planned: int, counted: int) -> bool:
    return abs(planned - counted) <= TOLERANCE * counted


@pytest.mark.parametrize(("make", "options"), RUNS, ids=IDS)
def test_planned_products_are_those_counted(make: Callable[[], Problem], options: dict[str, Any]) -> None:
    prepared = made(make, options)
    counted = counted_flops(prepared)
    assert sum(counted) > 0
    assert close(prepared.plan.product_flops, sum(counted)), (prepared.plan.product_flops, sum(counted))


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (mlp, {}), (cnn, {}), (rnn, {}), pytest.param(tables, {}, marks=pytest.mark.slow), (gated, {}),
        (elman, {"basis": "output"}), (cnn, {"basis": "output"}),
    ],
    ids=["mlp", "cnn", "rnn", "tables", "gated", "elman-output", "cnn-output"],
)  # fmt: skip
def test_every_tile_is_counted_whatever_its_stack(
    make: Callable[[], Problem], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiling, "STACK_BYTES", 60_000)
    monkeypatch.setattr(tiling, "TILE_BYTES", 3_000)
    monkeypatch.setattr(tiling, "CHUNK_BYTES", 2_000)
    for name in ("MICROBATCH", "LARGE_MICROBATCH"):
        monkeypatch.setattr(tiling, name, 7)
    for module in (memory, panel, rows):
        monkeypatch.setattr(module, "CACHE_BYTES", 3_000)
    monkeypatch.setattr("disthess.planning.cost.CACHE_BYTES", 3_000)
    prepared = made(make, options)
    plan = prepared.plan
    assert len(plan.layout.tiles) > len(plan.sources)
    for tile, planned, counted in zip(plan.layout.tiles, plan.tile_product_flops, counted_flops(prepared), strict=True):
        assert close(planned, counted), (tile, planned, counted)


def test_the_cache_is_one_size() -> None:
    assert memory.CACHE_BYTES == panel.CACHE_BYTES == rows.CACHE_BYTES


def test_columns_of_earlier_tiles_are_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "TILE_BYTES", 8_000)
    monkeypatch.setattr(tiling, "CHUNK_BYTES", 1)
    net = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 2))
    prepared = prepare(_problem(net, "mse", (_normal(9, 20), _normal(9, 2))), Options(basis="output"))
    plan = prepared.plan
    own = [
        flops
        for tile, flops in zip(plan.layout.tiles, plan.tile_product_flops, strict=True)
        if tile.source == "0.weight"
    ]
    assert len(own) > 3
    assert min(own) < 0.8 * max(own)
    assert sum(counted_flops(prepared)) == plan.product_flops


@pytest.mark.parametrize(
    ("make", "options"),
    [(mlp, {}), (cnn, {}), (rnn, {"shared": "uses"}), (transformer, ALL), (batch_norm, {})],
    ids=["mlp", "cnn", "rnn", "transformer", "batch_norm"],
)
def test_planned_bytes_are_those_written(make: Callable[[], Problem], options: dict[str, Any], tmp_path: Path) -> None:
    prepared = made(make, options)
    store = disthess.compute(prepared.problem, tmp_path / "run.zarr", progress=False, certify=False, **options)
    kinds = {panel.kind for panel in prepared.plan.layout.panels}
    chunks = [
        path for kind in kinds for path in (tmp_path / "run.zarr" / kind).rglob("*") if path.is_file() and path.name != "zarr.json"
    ]  # fmt: skip
    on_disk = sum(path.stat().st_size for path in chunks)
    assert abs(prepared.plan.disk_bytes - on_disk) <= 0.1 * on_disk
    records = {record.tile: record for record in store.store.records()}
    for tile in prepared.plan.layout.tiles:
        assert records[tile.index].written_bytes == tile.written_bytes


def test_autograds_work_is_called_an_estimate() -> None:
    plan = made(mlp, {"method": "autograd"}).plan
    assert plan.product_flops == 0 < plan.entry_flops == plan.flops
    assert "an estimate" in plan.describe()
    assert plan.seconds(1e9) == plan.flops / 1e9


def test_a_plan_says_what_it_counted() -> None:
    plan = made(mlp, {}).plan
    assert plan.flops == plan.product_flops + plan.entry_flops
    assert plan.to_json()["product_flops"] == plan.product_flops
    assert "in matrix products" in plan.describe()


class Tokens(nn.Module):
    """A linear model of tokens, of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 9)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.embed(ids)))).transpose(1, 2)


def lengths() -> Problem:
    batches = [(_classes(9, *shape), _classes(9, *shape)) for shape in ((6, 4), (5, 7), (8, 4))]
    return _problem(Tokens(), "cross_entropy", *batches)


def unequal_coupled() -> Problem:
    batches = [(_normal(size, 3), _classes(2, size)) for size in (12, 12, 7)]
    return _problem(BatchNormNet().train(), "cross_entropy", *batches)


@pytest.mark.parametrize("make", [lengths, unequal_coupled])
def test_batches_of_other_shapes_are_counted_on_their_own(make: Callable[[], Problem]) -> None:
    prepared = made(make, {})
    assert close(prepared.plan.product_flops, sum(counted_flops(prepared)))
