"""Layers whose weight is joined from parts become the layers of the parts: same Hessian, a sweep per output."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import disthess
from disthess.graph.program import build_programs


class Joined(nn.Module):
    """Query, key and value of one product, joined by hand; and a matrix joined along its other axis."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(3, 5))
        self.left, self.right = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(4, 3))
        self.bias, self.norm = nn.Parameter(torch.randn(5)), nn.LayerNorm(5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(nn.functional.linear(self.norm(x), torch.cat([self.q, self.k]), self.bias))
        return nn.functional.linear(hidden, torch.cat([self.left, self.right], dim=1)).mean(1)


def problem(model: nn.Module, *sizes: int) -> disthess.Problem:
    return disthess.Problem(
        model.double(),
        loss="mse",
        batches=[(torch.randn(*sizes, dtype=torch.float64), torch.randn(sizes[0], 4).double())],
    )


def bases(data: disthess.Problem, **options: object) -> dict[str, str]:
    return {source.source: source.basis for source in disthess.plan(data, **options).sources}


def test_joined_parameters_have_layers_of_their_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = problem(Joined(), 3, 2, 5)
    operations = [node.op for node in build_programs(data, frozenset({"q", "left"}))[0].graph.nodes]
    assert operations.count("aten.linear.default") == 4
    found = disthess.compute(data, tmp_path / "s.zarr", progress=False).dense()
    wanted = np.asarray(disthess.reference_hessian(data))
    assert np.abs(found - wanted).max() < 1e-13
    assert bases(data)["k"] == "output"


@pytest.mark.parametrize(
    ("patterns", "entries"),
    [
        pytest.param(["0.weight[2:4]"], 12, id="rows"),
        pytest.param(["0.weight[:, 1:5]"], 24, id="columns"),
        pytest.param(["0.weight[1:4, 2:6]"], 12, id="rows and columns"),
        pytest.param(["0.weight[0:2]", "0.weight[3:6, 0:3]", "0.bias[1:3]", "2.weight"], 12 + 9 + 2 + 24, id="many"),
    ],
)
def test_ranges_take_a_sweep_per_output(patterns: list[str], entries: int, tmp_path: Path) -> None:
    torch.manual_seed(1)
    data = problem(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)), 3, 6)
    store = disthess.compute(data, tmp_path / "s.zarr", parameters=patterns, progress=False)
    assert store.numel == entries
    assert {basis for name, basis in bases(data, parameters=patterns).items() if "bias" not in name} == {"output"}
    whole, start, places = np.asarray(disthess.reference_hessian(data)), 0, {}
    for name, tensor in data.model.named_parameters():
        places[name] = np.arange(start, start + tensor.numel()).reshape(tuple(tensor.shape))
        start += tensor.numel()
    chosen = []
    for entry in store.parameters:
        name, _, text = entry.name.partition("[")
        where = places[name]
        chosen.append((eval(f"where[{text}", {"where": where}) if text else where).reshape(-1))
    rows = np.concatenate(chosen)
    assert np.abs(store.dense() - whole[np.ix_(rows, rows)]).max() < 1e-13


def test_a_range_is_planned_at_no_more_than_its_share_of_the_layer() -> None:
    torch.manual_seed(2)
    data = problem(nn.Sequential(nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 4)), 8, 48)
    whole = disthess.plan(data, parameters=["0.weight"]).product_flops
    part = disthess.plan(data, parameters=["0.weight[0:4]"]).product_flops
    assert part < whole / 3


def test_an_activation_block_of_a_layer_that_was_cut_is_that_of_the_whole_layer(tmp_path: Path) -> None:
    torch.manual_seed(3)
    data = problem(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), 3, 6)
    whole = disthess.compute(data, tmp_path / "w.zarr", activations=["0"], progress=False).activation_block("0", "0")
    cut = disthess.compute(
        data, tmp_path / "c.zarr", parameters=["0.weight[0:2]"], activations=["0"], progress=False
    ).activation_block("0", "0")
    assert whole.shape == cut.shape == (5, 5)
    assert np.abs(whole - cut).max() < 1e-13
