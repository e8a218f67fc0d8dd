"""Blocks of single uses of shared parameters, against a model in which every use has a copy of its own."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import CASES
from torch import Tensor, nn
from torch.nn import functional as F

import disthess
from disthess.errors import StoreError, UnknownNameError


class Recurrent(nn.Module):
    """A cell unrolled over T steps, with one weight for all steps or one for each."""

    def __init__(self, steps: int, apart: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.inner, self.head = (nn.Parameter(0.6 * torch.randn(s)) for s in ((3, 3), (3, 2), (2, 3)))
        self.steps = steps
        self.copies = nn.ParameterList([self.weight.detach().clone() for _ in range(steps)]) if apart else None

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], 3, dtype=x.dtype)
        for step in range(self.steps):
            weight = self.weight if self.copies is None else self.copies[step]
            h = torch.tanh(F.linear(h, weight) + F.linear(x[:, step], self.inner))
        return F.linear(h, self.head)


def problem(apart: bool, steps: int = 4) -> disthess.Problem:
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(5, steps, 2, generator=g).double(), torch.randn(5, 2, generator=g).double()
    return disthess.Problem(Recurrent(steps, apart).double(), loss="mse", batches=[(x, y)])


def test_pairs_of_time_steps_are_the_blocks_of_copies(tmp_path: Path) -> None:
    store = disthess.compute(
        problem(False), tmp_path / "run.zarr", shared="uses", parts=("hessian", "ggn"), progress=False
    )
    uses = [use for use in store.uses() if use.startswith("weight@")]
    assert len(uses) == 4
    copies = problem(True)
    names = [parameter.name for parameter in copies.parameters()]
    sizes = [parameter.tensor.numel() for parameter in copies.parameters()]
    ends = dict(zip(names, itertools.accumulate(sizes), strict=True))
    for part in ("hessian", "ggn"):
        wanted = disthess.reference_hessian(copies, part)
        for (i, a), (j, b) in itertools.product(enumerate(uses), enumerate(uses)):
            rows, columns = (slice(ends[f"copies.{k}"] - 9, ends[f"copies.{k}"]) for k in (i, j))
            np.testing.assert_allclose(store.use_block(a, b, part), wanted[rows, columns], atol=1e-13)
        head = next(use for use in store.uses() if use.startswith("head@"))
        columns = slice(ends["head"] - 6, ends["head"])
        np.testing.assert_allclose(
            store.use_block(uses[1], head, part), wanted[ends["copies.1"] - 9 : ends["copies.1"], columns], atol=1e-13
        )
        np.testing.assert_allclose(store.use_block(head, head, part), wanted[columns, columns], atol=1e-13)


@pytest.mark.parametrize("name", ["tied_language_model", "tied_autoencoder", "rnn", "odd_shapes"])
def test_the_parameter_block_is_the_sum_over_pairs_of_uses(name: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    store = disthess.compute(
        case.make(), tmp_path / "run.zarr", shared="uses", parts=("hessian", "ggn"), progress=False
    )
    for part in ("hessian", "ggn", "residual"):
        for a, b in itertools.product(store.parameters, store.parameters):
            pairs = [store.use_block(u, w, part) for u in a.uses for w in b.uses]
            assert np.abs(sum(pairs) - store.block(a.name, b.name, part)).max() <= 1e-14


def test_a_store_of_sums_says_so(tmp_path: Path) -> None:
    store = disthess.compute(problem(False), tmp_path / "run.zarr", shared="sum", progress=False)
    uses = store.uses()
    with pytest.raises(StoreError, match="shared='uses'"):
        store.use_block(uses[0], uses[1])
    with pytest.raises(UnknownNameError, match="weight@"):
        store.use_block("weight@nothing", uses[0])
    # A parameter with one use has its own block.
    single = next(parameter for parameter in store.parameters if len(parameter.uses) == 1)
    np.testing.assert_array_equal(
        store.use_block(single.uses[0], single.uses[0]), store.block(single.name, single.name)
    )
