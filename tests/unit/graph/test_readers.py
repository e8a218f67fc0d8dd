"""Which samples read which rows, and that sweeping no others changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import disthess
from disthess.graph.readers import lookup_indices, table_lookups, table_readers
from disthess.graph.waves import source_leaves
from disthess.prepare import Options, Prepared, prepare
from disthess.problem import Problem, batch_tensors


class Words(nn.Module):
    """Tokens read as they are and shifted, with padding; positions; optionally the table as the head too."""

    def __init__(self, tied: bool = False, soft: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 4, padding_idx=0)
        self.place = nn.Embedding(5, 4)
        self.inner = nn.Linear(4, 4)
        self.tied, self.soft = tied, soft

    def forward(self, ids: Tensor) -> Tensor:
        moved = self.table((ids * 2 + 1) % 11)
        h = self.table(ids) + self.place(torch.arange(ids.shape[1])) + 0.3 * torch.sin(moved)
        if self.soft:
            h = h + self.table(h.mean(2).abs().long() % 11)
        h = h + torch.tanh(self.inner(h))
        return (h @ self.table.weight.T if self.tied else h).sum(1)


def problem(model: nn.Module, *sizes: int, top: int = 11) -> Problem:
    generator = torch.Generator().manual_seed(1)
    classes = 11 if getattr(model, "tied", False) else 4
    batches = [
        (torch.randint(top, (size, 3), generator=generator), torch.randint(classes, (size,), generator=generator))
        for size in sizes
    ]
    torch.manual_seed(2)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return Problem(model.double(), loss="cross_entropy", batches=batches)


def tables(prepared: Prepared) -> dict[str, int]:
    return {source.source: source.table_width for source in prepared.plan.sources if source.table_width}


def test_readers_are_those_that_hold_the_token() -> None:
    prepared = prepare(problem(Words(), 6), Options())
    graph, constants = prepared.programs[0].graph, prepared.programs[0].constants
    inputs = batch_tensors(prepared.problem.batches[0])
    lookups = table_lookups(graph, source_leaves(graph, "table.weight", "table.weight"))
    assert len(lookups) == 2
    found = table_readers(graph, lookups, lookup_indices(graph, lookups, inputs, constants), 6, 11)
    for row in range(11):
        reads = (inputs[0] == row) | ((inputs[0] * 2 + 1) % 11 == row)
        assert found[row] == tuple(torch.nonzero(reads.any(1)).flatten().tolist())


def test_a_weight_that_is_used_otherwise_is_no_table() -> None:
    assert tables(prepare(problem(Words(), 6), Options(shared="sum"))) == {"table.weight": 4}
    assert tables(prepare(problem(Words(tied=True), 6), Options(shared="sum"))) == {}


def test_of_uses_apart_each_is_a_table_or_not() -> None:
    found = tables(prepare(problem(Words(tied=True), 6), Options(shared="uses")))
    assert sorted(found) == ["table.weight@table.embedding", "table.weight@table.embedding_1"]


def test_places_that_depend_on_a_parameter_are_no_lookup() -> None:
    assert tables(prepare(problem(Words(soft=True), 6), Options(shared="sum"))) == {}


def test_a_table_that_every_sample_reads_whole_is_swept_as_any_other() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(15, 2)).double()
    batch = (torch.arange(5).expand(4, 5), torch.tensor([0, 1, 1, 0]))
    assert tables(prepare(Problem(model, loss="cross_entropy", batches=[batch]), Options())) == {}


@pytest.mark.parametrize("options", [{}, {"shared": "sum"}, {"executor": "threads", "workers": 2}], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_the_hessian_is_autograds(options: dict[str, Any], tied: bool, tmp_path: Any) -> None:
    # A batch of one sample has a graph of its own; tokens 9 and 10 are read by shifted places alone, some by nobody.
    data = problem(Words(tied=tied), 6, 9, 1, top=7)
    store = disthess.compute(data, tmp_path / "x.zarr", progress=False, **options)
    reference = np.asarray(disthess.reference_hessian(data))
    assert np.abs(store.dense() - reference).max() <= 1e-12 * np.abs(reference).max()


def test_a_row_that_nobody_reads_costs_nothing_and_is_zero(tmp_path: Any) -> None:
    model = nn.Sequential(nn.Embedding(1000, 3), nn.Flatten(), nn.Linear(6, 2)).double()
    batch = (torch.tensor([[1, 2], [3, 1]]), torch.tensor([0, 1]))
    data = Problem(model, loss="cross_entropy", batches=[batch])
    plan = prepare(data, Options()).plan
    of_table = {source.source: source for source in plan.sources}["0.weight"]
    assert of_table.table_width == 3
    assert plan.product_flops < 1e5
    store = disthess.compute(data, tmp_path / "x.zarr", progress=False)
    block = store.block("0.weight", "0.weight")
    used = np.zeros(1000, dtype=bool)
    used[[1, 2, 3]] = True
    rows = np.repeat(used, 3)
    assert np.any(block[np.ix_(rows, rows)])
    assert not np.any(block[~rows])
    assert not np.any(block[:, ~rows])
