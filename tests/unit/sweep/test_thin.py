"""Panel products of layers with one row a sample: when they are formed without rows, and that they are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import disthess
from disthess.rules.base import ThinRows
from disthess.sweep import panel
from disthess.sweep.frame import Frame


class Chain(nn.Module):
    """Three layers; what lies between the first and the second is given."""

    def __init__(self, between: str) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 4]`` to ``[N, 3]``."""
        z = self.first(x)
        if self.between == "curves":
            z = torch.nn.functional.gelu(torch.tanh(z))
        elif self.between == "sum":
            z = torch.tanh(z) + z
        elif self.between == "softmax":
            z = torch.softmax(z, 1)
        return self.third(torch.sigmoid(self.second(z)))


def problem(between: str) -> disthess.Problem:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Chain(between).double()
        batches = [(torch.randn(size, 4).double(), torch.randn(size, 3).double()) for size in (7, 3)]
    return disthess.Problem(model, loss="mse", batches=batches)


def thin_pairs(made: disthess.Problem, path: Path) -> tuple[disthess.HessianStore, set[tuple[str, str]]]:
    """The store, and (source, target) of the blocks that were multiplied without rows."""
    seen: set[tuple[str, str]] = set()
    add, take = panel.OutputSink._add_thin, panel.OutputSink.take_call

    def take_call(self: Any, frame: Frame, *rest: Any) -> None:
        self.graph = frame.primal.graph
        take(self, frame, *rest)

    def add_thin(self: Any, leaf: int, thin: ThinRows) -> None:
        layer = next(
            node
            for node in self.graph.nodes
            if node.kind == "use" and node.index in self.graph.nodes[self._layer.index].refs()
        )
        seen.add((layer.op, self.graph.nodes[leaf].op))
        add(self, leaf, thin)

    with (
        mock.patch.object(panel.OutputSink, "_add_thin", add_thin),
        mock.patch.object(panel.OutputSink, "take_call", take_call),
    ):
        return disthess.compute(made, path, basis="output"), seen


NEXT = ("second.weight", "third.weight")


@pytest.mark.parametrize("between", ["nothing", "curves", "sum", "softmax"])
def test_layers_joined_entry_by_entry_form_no_rows(between: str, tmp_path: Path) -> None:
    made = problem(between)
    store, seen = thin_pairs(made, tmp_path / "x.zarr")
    joined = between in ("nothing", "curves")
    assert seen == ({("first.weight", "second.weight"), NEXT} if joined else {NEXT})
    np.testing.assert_allclose(store.dense(), disthess.reference_hessian(made), atol=1e-13)


def test_parts_and_small_stacks_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disthess.sweep.thin.CACHE_BYTES", 300)
    monkeypatch.setattr("disthess.planning.tiling.STACK_BYTES", 4_000)
    monkeypatch.setattr("disthess.planning.tiling.CHUNK_BYTES", 1_000)
    made = problem("curves")
    store = disthess.compute(made, tmp_path / "x.zarr", basis="output", parts=("hessian", "ggn", "residual"))
    np.testing.assert_allclose(store.dense(), disthess.reference_hessian(made), atol=1e-13)
    np.testing.assert_allclose(store.dense("ggn") + store.dense("residual"), store.dense(), atol=1e-13)
    np.testing.assert_allclose(store.dense("ggn"), disthess.reference_hessian(made, part="ggn"), atol=1e-13)
