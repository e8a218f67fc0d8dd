"""Sources swept from unit vectors of their layer's output: convolutions and layers of several rows a sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from swept import ATOL, check_halved, check_small_tiles, engine_of
from torch import Tensor, nn

import disthess
from disthess.planning import tiling
from disthess.prepare import Options, prepare
from disthess.sweep import rows as rows_module
from disthess.sweep import thin


class Tokens(nn.Module):
    """Layers that meet three rows a sample, and then one that meets their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 5), nn.Linear(5, 7), nn.Linear(7, 9)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 3, 6]`` to ``[N, 9]``."""
        return self.head(torch.tanh(self.second(torch.sigmoid(self.first(x)))).mean(1))


class Recurrent(nn.Module):
    """An Elman network whose step has a bias; of as many steps as there are, at least one."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.again, self.leave = nn.Linear(5, 6, bias=False), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, 5]`` to ``[N, 4]``."""
        state = torch.sigmoid(self.enter(x[:, 0]))
        for step in range(1, x.shape[1]):
            state = torch.tanh(self.enter(x[:, step]) + self.again(state))
        return self.leave(state)


class Repeated(nn.Module):
    """A layer of three rows a sample and a convolution, each applied three times over."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.places, self.head = nn.Linear(10, 10), nn.Conv1d(3, 3, 11, padding=5), nn.Linear(30, 5)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 3, 10]`` to ``[N, 5]``."""
        for _ in range(3):
            x = torch.tanh(self.places(torch.sigmoid(self.rows(x))) + x)
        return self.head(x.flatten(1))


class Twice(nn.Module):
    """One weight in two branches, and again where they have met; optionally with samples that move each other."""

    def __init__(self, width: int = 5, coupled: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.head = nn.Linear(width, 3)
        self.coupled = coupled

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 2 width]`` to ``[N, 3]``."""
        left, right = (torch.tanh(nn.functional.linear(half, self.weight)) for half in x.chunk(2, 1))
        if self.coupled:
            left = left * left.mean(0)
        return self.head(nn.functional.linear(left * right, self.weight).exp())


def net(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "tokens": (Tokens, (3, 6), 9),
    "one_axis": (
        lambda: net(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Conv1d(3, 4, 2, stride=2), nn.GELU(), nn.Flatten(), nn.Linear(8, 3)),
        (2, 7), 3,
    ),
    "two_axes": (
        lambda: net(
            nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.AvgPool2d(2),
            nn.Flatten(), nn.Linear(4, 3),
        ),
        (1, 4, 4), 3,
    ),
    "dilated": (
        lambda: net(
            nn.Conv2d(2, 3, (2, 3), stride=(2, 1), dilation=(2, 1), padding="valid"), nn.Tanh(),
            nn.Conv2d(3, 2, 2, padding="same", dilation=2), nn.Flatten(), nn.Sigmoid(), nn.Linear(12, 2),
        ),
        (2, 6, 5), 2,
    ),
    "three_axes": (
        lambda: net(
            nn.Conv3d(1, 2, 2), nn.Tanh(), nn.Conv3d(2, 3, 2, bias=False), nn.Softplus(), nn.Flatten(), nn.Linear(3, 2)
        ),
        (1, 3, 3, 3), 2,
    ),
    "recurrent": (Recurrent, (4, 5), 4),
    "repeated": (Repeated, (3, 10), 5),
    "coupled": (lambda: Twice(20, coupled=True), (40,), 3),
    "twice": (Twice, (10,), 3),
    "one_place": (lambda: net(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3, 2)), (2, 3, 3), 2),
}  # fmt: skip


def problem(name: str, sizes: tuple[int, ...] = (6, 4)) -> disthess.Problem:
    make, shape, outputs = NETS[name]
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = make().double()
        batches = [(torch.randn(size, *shape).double(), torch.randint(outputs, (size,))) for size in sizes]
    return disthess.Problem(model, loss="cross_entropy", batches=batches)


@pytest.mark.parametrize("name", NETS)
def test_every_weight_has_an_output_basis_and_it_is_right(name: str, tmp_path: Path) -> None:
    made = problem(name)
    plan = disthess.plan(made, basis="output")
    assert all(source.basis == "output" for source in plan.sources if source.source.endswith("weight"))
    store = disthess.compute(made, tmp_path / "x.zarr", basis="output")
    np.testing.assert_allclose(store.dense(), disthess.reference_hessian(made), atol=ATOL)


@pytest.mark.parametrize("name", ["tokens", "two_axes", "recurrent", "repeated"])
def test_small_tiles_stacks_and_caches_agree(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_small_tiles(problem(name), tmp_path, monkeypatch, 4_000)


@pytest.mark.parametrize("name", ["tokens", "two_axes", "recurrent", "repeated", "coupled", "twice"])
def test_of_its_own_block_a_tile_has_the_columns_from_its_rows_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "TILE_BYTES", 4_000)
    made = problem(name)
    prepared = prepare(made, Options(basis="output", shared="sum"))
    values = {parameter.name: parameter.tensor.detach() for parameter in prepared.problem.parameters()}
    sources = {source.source: source for source in prepared.plan.sources}
    engine = engine_of(prepared)
    offsets = dict(zip(values, np.cumsum([0, *(value.numel() for value in values.values())]).tolist(), strict=False))
    wanted, later = disthess.reference_hessian(made), 0
    for tile in prepared.plan.layout.tiles:
        ((found,),) = engine.compute(tile.source, tile.span).values()
        if sources[tile.source].basis != "output":
            continue
        (panel,) = prepared.plan.layout.panels_of(tile.source)
        left = tile.span.start - panel.first_column(tile.span.start)
        square = found[:, left : left + tile.span.size]
        start = offsets[tile.source] + tile.span.start
        assert np.isnan(found[:, :left]).all()
        np.testing.assert_allclose(square, wanted[start : start + len(square), start : start + len(square)], atol=ATOL)
        later += left > 0
    assert later


def test_of_single_uses_a_tile_has_whole_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their blocks are added up, in chunks that need not begin where a tile does."""
    monkeypatch.setattr(tiling, "TILE_BYTES", 4_000)
    prepared = prepare(problem("recurrent"), Options(basis="output", shared="uses"))
    sources, engine = {source.source for source in prepared.plan.sources}, engine_of(prepared)
    assert len(prepared.plan.layout.tiles) > len(sources)
    for tile in prepared.plan.layout.tiles:
        panels = prepared.plan.layout.panels_of(tile.source)
        for panel, found in zip(panels, engine.compute(tile.source, tile.span)["hessian"], strict=True):
            assert panel.kind == "panels" or np.isfinite(found).all()


@pytest.mark.parametrize("lengths", [(2, 4), (4, 2), (1, 3), (3, 1)])
@pytest.mark.parametrize("basis", ["output", "parameter", None])
def test_batches_may_use_a_parameter_more_or_less_often(
    lengths: tuple[int, int], basis: Literal["output", "parameter"] | None, tmp_path: Path
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Recurrent().double()
        batches = [(torch.randn(5, steps, 5).double(), torch.randint(4, (5,))) for steps in lengths]
    made = disthess.Problem(model, loss="cross_entropy", batches=batches)
    store = disthess.compute(made, tmp_path / "x.zarr", basis=basis)
    np.testing.assert_allclose(store.dense(), disthess.reference_hessian(made), atol=ATOL)


def test_many_uses_of_few_inputs_keep_to_the_parameter() -> None:
    """Seven uses of five inputs are more tangents than entries, and counting each would be for nothing."""
    batch = (torch.randn(4, 7, 5).double(), torch.randint(4, (4,)))
    made = disthess.Problem(Recurrent().double(), loss="cross_entropy", batches=[batch])
    bases = {source.source: source.basis for source in disthess.plan(made, basis="output").sources}
    assert (bases["enter.weight"], bases["again.weight"], bases["leave.weight"]) == ("parameter", "output", "output")


def test_batches_may_differ_in_rows_a_sample(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Tokens().double()
        batches = [(torch.randn(4, rows, 6).double(), torch.randint(9, (4,))) for rows in (1, 3, 5)]
    made = disthess.Problem(model, loss="cross_entropy", batches=batches)
    store = disthess.compute(made, tmp_path / "x.zarr", basis="output")
    np.testing.assert_allclose(store.dense(), disthess.reference_hessian(made), atol=ATOL)


class EitherWay(nn.Module):
    """Two layers, the order of which depends on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, 4]`` to ``[N, 3]``; of an even T the other way round."""
        layers = (self.first, self.second) if x.shape[1] % 2 else (self.second, self.first)
        x = x.sum(1)
        for layer in layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def test_batches_may_pass_layers_in_another_order(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = EitherWay().double()
        batches = [(torch.randn(5, rows, 4).double(), torch.randint(3, (5,))) for rows in (3, 4)]
    made = disthess.Problem(model, loss="cross_entropy", batches=batches)
    store = disthess.compute(made, tmp_path / "x.zarr", basis="output", method="graph")
    np.testing.assert_allclose(store.dense(), disthess.reference_hessian(made), atol=ATOL)


def test_rows_of_a_shared_weight_are_added_up_before_they_are_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product for each use, each part of it and each unit, however many uses the rows come from."""
    calls: list[int] = []
    add = rows_module.add_products

    def counted(*arguments: Tensor) -> None:
        calls.append(len(arguments[0]))
        add(*arguments)

    monkeypatch.setattr(rows_module, "add_products", counted)
    prepared = prepare(problem("recurrent", (6,)), Options(basis="output", parameters="again.weight"))
    engine = engine_of(prepared)
    for tile in prepared.plan.layout.tiles:
        engine.compute(tile.source, tile.span)
    uses, units, inputs = 3, 6, 6
    assert sum(calls) == uses * units + (uses - 1) * inputs


@pytest.mark.parametrize("name", ["recurrent", "repeated", "two_axes"])
def test_less_memory_gives_the_same_rows(name: str) -> None:
    check_halved(problem(name))


def test_one_sample_is_enough(tmp_path: Path) -> None:
    made = problem("two_axes", (1,))
    store = disthess.compute(made, tmp_path / "x.zarr", basis="output")
    np.testing.assert_allclose(store.dense(), disthess.reference_hessian(made), atol=ATOL)


def test_a_convolution_is_swept_from_its_output_where_that_is_cheaper() -> None:
    """16 places of 4 channels are more tangents than 9 taps of each; 4 places of 16 are fewer than 36."""
    model = net(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 16, 3, stride=2, padding=1), nn.Flatten())
    batch = (torch.randn(8, 1, 4, 4), torch.randint(64, (8,)))
    plan = disthess.plan(disthess.Problem(model, loss="cross_entropy", batches=[batch]))
    bases = {source.source: source.basis for source in plan.sources}
    assert bases["0.weight"] == "parameter"
    assert bases["2.weight"] == "output"


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize(
    "layer", [nn.Conv2d(2, 4, 2, groups=2), nn.ConvTranspose2d(2, 4, 2), nn.Conv2d(2, 4, 2, padding="same")]
)
def test_other_convolutions_keep_to_their_parameters(layer: nn.Module, tmp_path: Path) -> None:
    model = net(layer, nn.Tanh(), nn.Flatten()).double()
    shape = model(torch.zeros(1, 2, 3, 3).double()).shape[1]
    made = disthess.Problem(
        model, loss="cross_entropy", batches=[(torch.randn(5, 2, 3, 3).double(), torch.randint(shape, (5,)))]
    )
    assert {source.basis for source in disthess.plan(made, basis="output").sources} == {"parameter"}
    store = disthess.compute(made, tmp_path / "x.zarr", basis="output")
    np.testing.assert_allclose(store.dense(), disthess.reference_hessian(made), atol=ATOL)


@pytest.mark.parametrize(("bent", "moved"), [(True, False), (False, True), (True, True)])
def test_tangents_times_inputs_first_are_fewer_products_exactly_where_said(bent: bool, moved: bool) -> None:
    for rows in (2, 5, 40):
        for width in (1, 6, 30):
            for shape in ((1, 1), (3, 50), (50, 50)):
                outputs, inputs = shape
                by_rows = rows * outputs * inputs * (bent + moved) + rows * width * outputs * inputs
                first = width * rows * (outputs * bent + inputs * moved) + width * outputs * inputs * (bent + moved)
                assert thin.first_multiply_adds(rows, width, shape, bent, moved) == first
                assert thin.contracts_first(rows, width, shape, bent, moved) == (first < by_rows)
