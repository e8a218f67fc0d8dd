"""Sources swept from unit vectors of their layer's output: convolutions and layers of several rows a sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import disthess
from disthess.planning import tiling
from disthess.sweep import thin

ATOL = 1e-12


class Tokens(nn.Module):
    """Layers that meet three rows a sample, and then one that meets their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 5), nn.Linear(5, 7), nn.Linear(7, 9)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 3, 6]`` to ``[N, 9]``."""
        return self.head(torch.tanh(self.second(torch.sigmoid(self.first(x)))).mean(1))


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


@pytest.mark.parametrize("name", ["tokens", "two_axes"])
def test_small_tiles_stacks_and_caches_agree(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for where, size in (("TILE_BYTES", 4_000), ("CHUNK_BYTES", 1), ("STACK_BYTES", 4_000)):
        monkeypatch.setattr(tiling, where, size)
    for module in ("thin", "panel"):
        monkeypatch.setattr(f"disthess.sweep.{module}.CACHE_BYTES", 300)
    made = problem(name)
    plan = disthess.plan(made, basis="output")
    assert len(plan.layout.tiles) > len(plan.sources)
    store = disthess.compute(made, tmp_path / "x.zarr", basis="output", parts=("hessian", "ggn", "residual"))
    np.testing.assert_allclose(store.dense(), disthess.reference_hessian(made), atol=ATOL)
    np.testing.assert_allclose(store.dense("ggn"), disthess.reference_hessian(made, part="ggn"), atol=ATOL)
    np.testing.assert_allclose(store.dense("ggn") + store.dense("residual"), store.dense(), atol=ATOL)


def test_one_sample_is_enough(tmp_path: Path) -> None:
    made = problem("two_axes", (1,))
    store = disthess.compute(made, tmp_path / "x.zarr", basis="output")
    np.testing.assert_allclose(store.dense(), disthess.reference_hessian(made), atol=ATOL)


def test_a_convolution_is_swept_from_its_output_where_that_is_cheaper() -> None:
    """64 places of 4 channels are more tangents than 9 taps of each; 4 places of 16 are fewer than 36."""
    model = net(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.MaxPool2d(4), nn.Conv2d(4, 16, 3, padding=1), nn.Flatten())
    batch = (torch.randn(8, 1, 8, 8), torch.randint(64, (8,)))
    plan = disthess.plan(disthess.Problem(model, loss="cross_entropy", batches=[batch]))
    bases = {source.source: source.basis for source in plan.sources}
    assert bases["0.weight"] == "parameter"
    assert bases["3.weight"] == "output"


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
