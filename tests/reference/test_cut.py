"""Ranges of parameters as all that is differentiated, against the rows and columns of the dense Hessian."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import disthess
from disthess import hvp
from disthess.errors import ConfigError


class Attend(nn.Module):
    """Attention, and one matrix under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.norm = nn.MultiheadAttention(4, 2, batch_first=True), nn.LayerNorm(4)
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.down.weight = self.up.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(self.norm(x + self.attend(x, x, x)[0])))).mean(1)


def problem() -> disthess.Problem:
    torch.manual_seed(2)
    data = (torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64))
    return disthess.Problem(Attend().double(), loss="mse", batches=[data], weight_decay={"up.weight": 0.2})


def places(model: nn.Module) -> dict[str, np.ndarray]:
    found, start = {}, 0
    for name, tensor in model.named_parameters():
        found[name] = np.arange(start, start + tensor.numel()).reshape(tuple(tensor.shape))
        start += tensor.numel()
    return found


@pytest.mark.parametrize("method", ["graph", "autograd"])
def test_ranges_are_rows_and_columns_of_the_whole(method: str, tmp_path: Path) -> None:
    data = problem()
    wanted, where = np.asarray(disthess.reference_hessian(data)), places(data.model)
    chosen = ["attend.in_proj_weight[0:2]", "norm.*", "up.weight[:, 1:3]", "up.weight[3, 3:]"]
    before = {name: tensor.clone() for name, tensor in data.model.state_dict().items()}
    store = disthess.compute(data, tmp_path / "s.zarr", parameters=chosen, method=method, progress=False)
    indices = {
        "attend.in_proj_weight[0:2]": where["attend.in_proj_weight"][0:2],
        "norm.weight": where["norm.weight"],
        "norm.bias": where["norm.bias"],
        "up.weight[:, 1:3]": where["up.weight"][:, 1:3],
        "up.weight[3, 3:]": where["up.weight"][3, 3:],
    }
    assert {entry.name for entry in store.parameters} == set(indices)
    for a, rows in indices.items():
        for b, columns in indices.items():
            found = store.block(a, b)
            assert np.allclose(found, wanted[np.ix_(rows.reshape(-1), columns.reshape(-1))], rtol=0, atol=1e-12), (a, b)
    # The user's own model is what it was, and running again resumes the same store.
    assert type(data.model.up) is nn.Linear
    assert all(torch.equal(tensor, before[name]) for name, tensor in data.model.state_dict().items())
    again = disthess.compute(data, tmp_path / "s.zarr", parameters=chosen, method=method, progress=False)
    assert np.array_equal(again.dense(), store.dense())


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (["up.weight[0:2]", "up.*"], "by another pattern"),
        (["up.weight[0:2]", "up.weight[1:3]"], "overlap"),
        (["up.weight[0:9]"], "outside"),
        (["up.wight[0:2]"], "matches no trainable"),
    ],
)
def test_ranges_that_mean_nothing_are_refused(chosen: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        disthess.plan(problem(), parameters=chosen)


def test_a_module_that_keeps_its_parameters_elsewhere_is_refused() -> None:
    torch.manual_seed(0)

    class Kept(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 3)
            self.kept = [self.weight]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.kept[0] + self.bias

    data = disthess.Problem(Kept(), loss="mse", batches=[(torch.randn(4, 3), torch.randn(4, 3))])
    with pytest.raises(ConfigError, match="cannot be cut out"):
        disthess.plan(data, parameters=["weight[0:2]", "bias"])


def test_a_recurrent_layer_is_refused() -> None:
    torch.manual_seed(0)

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.lstm(x)[0][:, -1])

    data = disthess.Problem(Last(), loss="mse", batches=[(torch.randn(4, 3, 2), torch.randn(4, 2))])
    with pytest.raises(ConfigError, match="recurrent layers"):
        disthess.plan(data, parameters=["lstm.weight_ih_l0[0:3]"])


def test_what_torch_keeps_follows_the_subset() -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(8) for layer in (nn.Linear(32, 32), nn.Tanh())]
    data = disthess.Problem(
        nn.Sequential(*layers, nn.LayerNorm(32)), loss="mse", batches=[(torch.randn(64, 32), torch.randn(64, 32))]
    )
    kept: dict[str, int] = {}
    for name in ("16.weight", "0.weight"):
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            tape = hvp.GradientTape(data, 0, [name])
        kept[name] = sum(sizes.values())
        assert tape.gradient().numel() in (32, 1024)
    assert kept["16.weight"] * 4 < kept["0.weight"]


def test_a_batch_that_does_not_reach_the_subset_adds_nothing() -> None:
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 1), nn.Linear(3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x).tanh() if len(x) == 2 else self.b(x)

    batches = [(torch.randn(size, 3), torch.randn(size, 1)) for size in (2, 4)]
    both = disthess.Problem(Two(), loss="mse", batches=batches, weights=[1.0, 1.0])
    one = disthess.Problem(both.model, loss="mse", batches=batches[:1])
    vectors = torch.eye(3)
    found = hvp.hessian_vector_products(both, ["a.weight"], vectors)
    assert torch.equal(found, hvp.hessian_vector_products(one, ["a.weight"], vectors))
    assert found.abs().max() > 0


def test_ranges_that_no_straight_cut_parts_are_placed_one_after_the_other(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = (torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64))
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    # A pinwheel around the entry in the middle.
    chosen = ["0.weight[0:1, 0:2]", "0.weight[0:2, 2:3]", "0.weight[2:3, 1:3]", "0.weight[1:3, 0:1]"]
    case = disthess.Problem(model, loss="mse", batches=[data])
    whole = np.asarray(disthess.reference_hessian(case))
    store = disthess.compute(case, tmp_path / "s.zarr", parameters=chosen, progress=False)
    rows = [0, 1, 2, 5, 7, 8, 3, 6]
    assert [entry.name for entry in store.parameters] == chosen
    assert np.abs(store.dense() - whole[np.ix_(rows, rows)]).max() < 1e-14
