"""Plans for machines and weights that are not here: their limits of time and memory, and their numbers by other ways."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Attention, BatchNormNet, UnrolledRnn
from planned import PLANNED, decoder, measured
from torch import Tensor, nn

import disthess
from disthess.errors import ConfigError, PlanError, ProblemError
from disthess.planning import planner
from disthess.prepare import Options, prepare
from disthess.problem import Problem

SECONDS, BYTES = 60, 2 * 10**9
MILLION = ("mlp", "mlp of many tiles", "transformer")
BILLIONS = ("norms of 7 billion", "projections of 7 billion", "norms of transformers' 7 billion")
SMALL = ("small mlp", "one layer of 7 billion")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MILLION, *BILLIONS])
def test_a_large_plan_is_made_in_a_minute_and_two_gigabytes(name: str) -> None:
    if "transformers" in name:
        pytest.importorskip("transformers")
    (found,) = measured(name)
    check(name, found)


@pytest.mark.slow
def test_smaller_ones_are_as_well() -> None:
    for name, found in zip(SMALL, measured(*SMALL), strict=True):
        check(name, found)


def check(name: str, found: dict[str, Any]) -> None:
    assert found["seconds"] < SECONDS
    assert found["peak_bytes"] < BYTES
    assert found["tiles"] == found["queued"] > 0
    if name in MILLION:
        assert 0.9e6 < found["numel"] < 1.2e6
    if name in BILLIONS:
        assert 6.5e9 < found["model_numel"] < 7.5e9
    workers = PLANNED[name][1]["workers"]
    for item in ("on disk", "FLOP in matrix products", f"{workers} x 1", "on cuda", "peak memory", "imbalance", "time"):
        assert item in found["text"]
    assert ("not checked" in found["text"]) == ("billion" in name)


class Mixed(nn.Module):
    """Operations with and without rules of their own, a buffer, a cast, positions on the input's device."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(12, 6), nn.Linear(6, 6), nn.Linear(6, 12)
        self.norm = nn.LayerNorm(6)
        self.register_buffer("scale", torch.linspace(0.5, 1.0, 6))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids) + torch.arange(ids.shape[1], device=ids.device).to(self.scale)[:, None] * self.scale
        h = self.norm(torch.special.erf(self.inner(h)) + torch.cumsum(h, 1))
        return self.head(h).transpose(1, 2)


def tokens(words: int, samples: int, length: int) -> Tensor:
    return torch.randint(words, (samples, length))


def embedding() -> Problem:
    return Problem(Attention(11, 6, 5), loss="cross_entropy", batches=[(tokens(11, 6, 5), tokens(11, 6, 5))])


def long_tables() -> Problem:
    batches = [(tokens(40, n, 5), tokens(40, n, 5)) for n in (9, 6)]
    return Problem(Attention(40, 6, 5), loss="cross_entropy", batches=batches)


def mixed() -> Problem:
    return Problem(Mixed(), loss="cross_entropy", batches=[(tokens(12, 4, 5), tokens(12, 4, 5))])


def recurrent() -> Problem:
    return Problem(UnrolledRnn(4), loss="mse", batches=[(torch.randn(8, 4, 2), torch.randn(8, 2))])


def coupled() -> Problem:
    return Problem(BatchNormNet().train(), loss="cross_entropy", batches=[(torch.randn(12, 3), tokens(2, 12, 1)[:, 0])])


def convolutions() -> Problem:
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.GELU(), nn.MaxPool2d(2), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(27, 3)
    )
    return Problem(net, loss="cross_entropy", batches=[(torch.randn(10, 1, 8, 8), tokens(3, 10, 1)[:, 0])])


def deep() -> Problem:
    return decoder(width=8, inner=12, heads=2, layers=3, words=10, samples=3, tokens=4, device="cpu")


def light() -> Problem:
    net = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 3))
    return Problem(net, loss="cross_entropy", batches=[(torch.ones(9, 6), torch.zeros(9, dtype=torch.long))])


def without_values(problem: Problem, data: bool) -> Problem:
    """The same shapes on the meta device; with ``data`` the batches stay."""
    bare = problem.to(problem.dtype, "meta")
    if data:
        bare.batches = problem.batches
    return bare


CASES = {make.__name__: make for make in (embedding, long_tables, mixed, recurrent, coupled, convolutions, deep)}
BOTH: dict[str, Any] = {"parts": ("hessian", "ggn")}


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in CASES), ("recurrent", {"shared": "sum", "dtype": "float64"}), ("convolutions", BOTH)],
)
def test_a_plan_without_values_is_that_with_values(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    problem = CASES[name]()
    full = disthess.plan(problem, **options)
    bare = disthess.plan(without_values(problem, data=True), **options)
    assert bare.flops == full.flops
    words = ("independence", "method_reason", "not_checked")
    assert dataclasses.replace(bare, **{word: getattr(full, word) for word in words}) == full


@pytest.mark.parametrize("name", ["coupled", "convolutions"])
def test_batches_may_be_without_values_too(name: str) -> None:
    torch.manual_seed(0)
    problem = CASES[name]()
    bare, full = disthess.plan(without_values(problem, data=False)), disthess.plan(problem)
    assert not any(source.table_width for source in full.sources)
    assert (bare.layout, bare.tile_product_flops) == (full.layout, full.tile_product_flops)


def test_every_sample_reads_every_row_of_a_table_whose_indices_have_no_values() -> None:
    torch.manual_seed(0)
    problem = long_tables()
    full, bare = disthess.plan(problem), disthess.plan(without_values(problem, data=False))
    assert any(source.table_width for source in full.sources)
    assert not any(source.table_width for source in bare.sources)
    assert bare.flops > full.flops


def test_a_plan_without_values_says_what_was_not_checked() -> None:
    text = disthess.plan(without_values(mixed(), data=True)).describe()
    assert "by structure alone" in text
    assert "aten.special_erf.default" in text
    assert "not checked" in text
    assert "central differences" in text
    assert "not checked" not in disthess.plan(mixed()).describe()


def test_coupled_samples_are_seen_by_structure() -> None:
    assert "coupled" in disthess.plan(without_values(coupled(), data=True)).independence


@pytest.mark.parametrize("data", [True, False])
def test_a_problem_without_values_is_planned_and_nothing_else(tmp_path: Path, data: bool) -> None:
    bare = without_values(light(), data)
    for call in (
        lambda: disthess.compute(bare, tmp_path / "run.zarr"),
        lambda: disthess.reference_hessian(bare),
        lambda: disthess.node_curvature(bare),
        lambda: prepare(bare, Options()),
    ):
        with pytest.raises(ProblemError, match=r"shapes and no values: parameter 0.weight is on torch's meta device"):
            call()
    assert not (tmp_path / "run.zarr").exists()


def test_batches_alone_without_values_are_named() -> None:
    problem = Problem(nn.Linear(2, 1), loss="mse", batches=[tuple(torch.empty(3, n, device="meta") for n in (2, 1))])
    assert problem.without_values == "batch 0"
    assert disthess.plan(problem).flops == disthess.plan(without_values(problem, data=False)).flops


def test_shapes_are_still_checked_without_values() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 1)
    with pytest.raises(ProblemError, match="must be a scalar"):
        disthess.plan(Problem(model, objective=lambda m, x: m(x), batches=[torch.ones(3, 2)]))
    with pytest.raises(ProblemError, match="does not depend"):
        disthess.plan(Problem(model, objective=lambda m, x: m(x).detach().sum(), batches=[torch.ones(3, 2)]))


def test_a_model_that_cannot_be_captured_is_planned_by_autograd() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 1)
    plan = disthess.plan(Problem(model, loss="mse", batches=[(torch.ones(3, 2), torch.ones(3, 1))]), method="autograd")
    assert plan.method == "autograd"
    assert "no values" in plan.not_checked


@pytest.mark.parametrize("workers", [1, 3, 64])
def test_imbalance_is_the_busiest_worker_over_the_mean(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr("disthess.planning.tiling.TILE_BYTES", 4_000)
    executor = "serial" if workers == 1 else "ray"
    plan = disthess.plan(light(), executor=executor, workers=workers, device="cuda")
    tree = json.loads(json.dumps(plan.to_json()))
    load: dict[int, int] = defaultdict(int)
    for tile in tree["tiles"]:
        load[tile["owner"]] += tile["flops"]
    expected = max(load.values()) / (sum(load.values()) / workers)
    assert tree["imbalance"] == plan.imbalance == pytest.approx(expected)
    assert plan.worker_flops == tuple(load[worker] for worker in range(workers))
    assert (f"{expected:.3f} times the mean" in plan.describe()) == (workers > 1)
    busiest = defaultdict(int)
    for tile, flops in zip(tree["tiles"], plan.tile_product_flops, strict=True):
        busiest[tile["owner"]] += flops
    assert plan.seconds(2e9) == pytest.approx(max(busiest.values()) / 2e9)


def test_more_tiles_than_a_store_can_list_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = disthess.plan(light())
    monkeypatch.setattr(planner, "MAX_TILES", len(plan.layout.tiles))
    assert disthess.plan(light()) == plan
    monkeypatch.setattr(planner, "MAX_TILES", len(plan.layout.tiles) - 1)
    with pytest.raises(PlanError, match=r"would take more than \d+ tiles.*Select fewer parameters"):
        disthess.plan(light())


def test_neither_the_disk_nor_the_memory_here_is_asked_for_a_device_that_is_not_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("disthess.api.is_device_here", lambda device: device == "cpu")
    monkeypatch.setattr("disthess.store.disk.shutil.disk_usage", lambda place: type("Disk", (), {"free": 10}))
    monkeypatch.setattr("disthess.api.available_memory_bytes", lambda: 10)
    assert disthess.plan(light(), path=tmp_path / "run.zarr", executor="ray", workers=64, device="cuda").workers == 64
    assert disthess.plan(light(), executor="ray", workers=64, address="ray://head:10001").workers == 64
    with pytest.raises(disthess.api.StoreError, match="left"):
        disthess.plan(light(), path=tmp_path / "run.zarr")
    with pytest.raises(PlanError, match="of memory"):
        disthess.plan(light())
    with pytest.raises(PlanError, match="memory_bytes allows"):
        disthess.plan(light(), device="cuda", memory_bytes=1000)


def test_a_device_that_torch_does_not_know_is_refused() -> None:
    with pytest.raises(ConfigError, match="no device that torch knows"):
        disthess.plan(light(), device="gpu")
