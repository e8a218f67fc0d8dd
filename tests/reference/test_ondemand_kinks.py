"""Blocks asked for where the weights lie on a kink: autograd's convention where all products share it, else the true reason."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import disthess
from disthess.cli.main import app
from disthess.errors import CertificateError


class Tanh(torch.autograd.Function):
    """Without a forward mode, so that a block is compared with differences of the gradient."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad * (1 - ctx.saved_tensors[0].tanh() ** 2)


class Net(nn.Module):
    """The first hidden unit has no weights: its input is exactly 0 for every sample."""

    def __init__(self, act: nn.Module, *, differences: bool = False, branch: bool = False) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(3, 4), act, nn.Linear(4, 2)
        self.differences, self.branch = differences, branch
        with torch.no_grad():
            self.first.weight[0] = 0
            self.first.bias[0] = 0

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.first(x))
        if self.branch and bool(hidden.sum() > 1e9):
            return self.last(-hidden)
        return self.last(Tanh.apply(hidden) if self.differences else hidden)


def problem(act: nn.Module | None = None, *, dtype: torch.dtype = torch.float64, **how: bool) -> disthess.Problem:
    torch.manual_seed(0)
    model = Net(act or nn.ReLU(), **how).to(dtype)
    return disthess.Problem(
        model, loss="mse", batches=[(torch.randn(5, 3, dtype=dtype), torch.randn(5, 2, dtype=dtype))]
    )


def relu_by_differences() -> disthess.Problem:
    return problem(differences=True)


class Norm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (x[:, :1].norm(dim=1, keepdim=True) + 1)


KINKED: dict[str, tuple[Callable[[], disthess.Problem], str]] = {
    "relu": (relu_by_differences, r"act \(relu\) is tied at 5 entries in 5 samples, and torch takes slope 0"),
    "relu in float32": (lambda: problem(differences=True, dtype=torch.float32), r"act \(relu\) is tied at 5 entries"),
    "prelu, which torch bends": (lambda: problem(nn.PReLU()), r"act \(prelu\) is tied .* the negative slope"),
    "a norm of 0": (lambda: problem(Norm()), r"act\.linalg_vector_norm .* no second derivative"),
    "a graph that torch cannot capture": (
        lambda: problem(differences=True, branch=True),
        "which operation is tied is not known, the model cannot be captured",
    ),
}


@pytest.mark.parametrize("name", KINKED)
def test_the_kink_is_named_and_nothing_is_kept(name: str, tmp_path: Path) -> None:
    make, wanted = KINKED[name]
    cache = disthess.open_cache(tmp_path / "c.zarr", make())
    with pytest.raises(
        CertificateError, match=rf"on a kink of the objective.*{wanted}.*Move the weights.*clarke_hessian"
    ):
        cache.read("first.bias", "first.weight", compute=True)
    assert cache.store.present() == ()


def test_beside_the_kink_the_same_block_is_right(tmp_path: Path) -> None:
    data = relu_by_differences()
    with torch.no_grad():
        data.model.first.bias[0] = 1e-3
    wanted = np.asarray(disthess.reference_hessian(data))
    found = disthess.open_cache(tmp_path / "c.zarr", data).read("first.bias", "first.weight", compute=True)
    assert np.abs(found - wanted[12:16, :12]).max() < 1e-12


def test_where_every_product_takes_the_same_side_the_block_is_autograds(tmp_path: Path) -> None:
    data = problem()
    wanted = np.asarray(disthess.reference_hessian(data))
    found = disthess.open_cache(tmp_path / "c.zarr", data).read("first.bias", "first.weight", compute=True)
    assert np.abs(found - wanted[12:16, :12]).max() < 1e-12
    assert np.abs(found).max() > 1e-3
    assert (found[0] == 0).all()


def test_a_wrong_derivative_is_not_called_a_kink_though_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        slope = 1 - x.tanh() ** 2
        return grad * (0.9 * slope + 0.1 * slope.detach())

    monkeypatch.setattr(Tanh, "backward", staticmethod(backward))
    cache = disthess.open_cache(tmp_path / "c.zarr", relu_by_differences())
    with pytest.raises(CertificateError, match="wrong second derivative") as raised:
        cache.read("first.bias", "first.weight", compute=True)
    assert "kink" not in str(raised.value)


CONFIG = """
problem:
  factory: kinked:make
compute:
  store: unused.zarr
"""


def test_the_command_line_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = str(Path(__file__).parent)
    (tmp_path / "kinked.py").write_text(
        textwrap.dedent(
            f"import sys\nsys.path.insert(0, {here!r})\nfrom test_ondemand_kinks import relu_by_differences as make\n"
        )
    )
    (tmp_path / "run.yaml").write_text(CONFIG)
    done = CliRunner().invoke(
        app, ["block", "c.zarr", "first.bias", "first.weight", "--compute", "--config", "run.yaml"]
    )
    assert done.exit_code == 1
    assert "the weights lie on a kink of the objective" in done.stderr
    assert "act (relu) is tied at 5 entries in 5 samples" in done.stderr
