"""Work of tiles from integers: what is done once, per sample, per tangent, and for columns that are left out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disthess.planning.cost import tile_cost
from disthess.planning.source import OwnColumns, SourcePlan
from disthess.planning.work import ReverseWork, SharedWork, SweepWork, Work
from disthess.planning.workload import BatchRun, SourceCost, Workload
from disthess.types import Span

COUNTS = st.integers(0, 50)
WORKS = st.builds(Work, COUNTS, COUNTS, COUNTS, COUNTS)


def workload(*runs: BatchRun, samples: int = 10, batches: int = 1, largest: int = 10) -> Workload:
    return Workload("toy", (), (), (), samples, largest, batches, samples, True, "", 1, 1, 8, runs=runs)


def source(*sweeps: SweepWork) -> SourceCost:
    """A layer of 4 outputs and 3 inputs, one row per sample."""
    found = (("output", sweeps), ("parameter", sweeps))
    return SourceCost("w", "w", ("w@fc",), 1, 12, 4, 3, 1, 5, 2, 7, 12, True, 10, 10, 0, found)


@given(WORKS, WORKS, st.integers(1, 9), st.integers(1, 9))
def test_work_adds_up(one: Work, other: Work, tangents: int, samples: int) -> None:
    assert (one + other).at(tangents, samples) == one.at(tangents, samples) + other.at(tangents, samples)


def test_every_block_meets_every_microbatch() -> None:
    forward, first, later = Work(once=1), Work(once=100), Work(once=10, per_pair=1000)
    cost = source(SweepWork(forward, (ReverseWork("hessian", first, later),)))
    plan = SourcePlan("w", "w", ("w@fc",), "parameter", 5, 4, 1)
    # 12 rows in stacks of 5, 5, 2; 10 samples in microbatches of 4, 4, 2, of which the first is its own.
    found = tile_cost(cost, plan, Span(0, 12), OwnColumns(), workload(BatchRun(0, 10)), ("hessian",))
    assert found.products == 3 * 3 * 1 + 3 * 100 + 3 * 2 * 10 + 1000 * 12 * 6
    assert found.entries == 10 * 12 * (5 + 2)
    assert found.total == found.products + found.entries


def test_only_the_parts_wanted_are_counted() -> None:
    waves = tuple(ReverseWork(part, Work(once=size), Work()) for part, size in (("hessian", 1), ("ggn", 10)))
    plan = SourcePlan("w", "w", ("w@fc",), "parameter", 12, 10, 1)
    cost, work = source(SweepWork(Work(), waves)), workload()
    assert tile_cost(cost, plan, Span(0, 12), OwnColumns(), work, ("hessian",)).products == 1
    assert tile_cost(cost, plan, Span(0, 12), OwnColumns(), work, ("hessian", "ggn")).products == 11


def test_the_own_block_takes_pairs_of_inputs_and_leaves_columns_out() -> None:
    cost = source(SweepWork(Work(), (ReverseWork("hessian", Work(), Work(), own=True),)))
    plan = SourcePlan("w", "w", ("w@fc",), "output", 4, 10, 3)
    pairs = 6
    assert tile_cost(cost, plan, Span(0, 12), OwnColumns(), workload(), ("hessian",)).products == 10 * 4 * 4 * pairs
    assert (
        tile_cost(cost, plan, Span(6, 12), OwnColumns(2, True), workload(), ("hessian",)).products == 10 * 2 * 2 * pairs
    )


def test_units_of_several_rows_take_the_columns_from_their_own_on() -> None:
    cost = source(SweepWork(Work(), (ReverseWork("hessian", Work(), Work(), own=True),), rows=5, layer_rows=5))
    plan = SourcePlan("w", "w", ("w@fc",), "output", 4, 10, 3)
    each = 10 * 5 * 3 * (5 + 3)
    assert tile_cost(cost, plan, Span(0, 12), OwnColumns(), workload(), ("hessian",)).products == each * 4 * 4
    upper = tile_cost(cost, plan, Span(0, 12), OwnColumns(0, True), workload(), ("hessian",))
    assert upper.products == each * (4 + 3 + 2 + 1)
    assert tile_cost(cost, plan, Span(6, 12), OwnColumns(2, True), workload(), ("hessian",)).products == each * (2 + 1)


def test_rows_pooled_to_fewer_places_take_fewer_tangents() -> None:
    wave = ReverseWork("hessian", Work(per_pair=7), Work(per_pair=7), own=True)
    cost = source(SweepWork(Work(), (wave,), rows=2, layer_rows=5))
    plan = SourcePlan("w", "w", ("w@fc",), "output", 4, 10, 3)
    found = tile_cost(cost, plan, Span(0, 12), OwnColumns(), workload(), ("hessian",)).products
    assert found == 10 * 4 * 2 * 7 + 10 * 2 * 3 * (5 + 3) * 4 * 4


def test_the_own_block_of_several_uses_is_formed_group_by_group(monkeypatch: pytest.MonkeyPatch) -> None:
    wave = ReverseWork("hessian", Work(), Work(), shared=SharedWork(forward=7, back=11, per_unit=13))
    cost = source(SweepWork(Work(), (wave,), rows=2))
    plan = SourcePlan("w", "w", ("w@fc",), "output", 3, 10, 3)
    # Rows of one unit take 2 x 10 x 12 x 8 bytes: groups of two, in stacks of three, begin at units 0, 2 and 3.
    monkeypatch.setattr("disthess.planning.cost.CACHE_BYTES", 2 * 1920)
    formed = 2 * 4 + 1 * 2 + 1 * 1
    found = tile_cost(cost, plan, Span(0, 12), OwnColumns(0, True), workload(), ("hessian",))
    assert found.products == 10 * 2 * formed * 7 + 10 * 4 * 3 * 2 * 11 + 10 * 4 * 4 * 13
    last = tile_cost(cost, plan, Span(9, 12), OwnColumns(3, True), workload(), ("hessian",))
    assert last.products == 10 * 2 * 1 * 7 + 10 * 1 * 3 * 2 * 11 + 10 * 1 * 1 * 13


def test_rows_formed_sample_by_sample_start_anew_for_each_group() -> None:
    wave = ReverseWork("hessian", Work(), Work(), repeated=((4 << 20, 3),))
    plan = SourcePlan("w", "w", ("w@fc",), "output", 4, 10, 3)
    # Rows of one unit exceed the cache already: each of 4 units is a group of its own.
    assert tile_cost(
        source(SweepWork(Work(), (wave,))), plan, Span(0, 12), OwnColumns(), workload(), ("hessian",)
    ).products == (10 * 4 * 3)


def test_batches_run_on_their_own_graphs() -> None:
    small, large = (SweepWork(Work(per_sample=size), ()) for size in (1, 100))
    plan = SourcePlan("w", "w", ("w@fc",), "parameter", 12, 256, 1)
    runs = (BatchRun(0, 3), BatchRun(1, 5), BatchRun(0, 3))
    found = tile_cost(source(small, large), plan, Span(0, 12), OwnColumns(), workload(*runs), ("hessian",))
    assert found.products == 2 * 3 + 5 * 100


def test_coupled_batches_count_by_their_size() -> None:
    cost = source(SweepWork(Work(once=100), ()))
    plan = SourcePlan("w", "w", ("w@fc",), "parameter", 12, 256, 1)
    work = workload(BatchRun(0, 1, 12, 12), BatchRun(0, 1, 6, 12))
    assert tile_cost(cost, plan, Span(0, 12), OwnColumns(), work, ("hessian",)).products == 150


@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 40))
def test_batches_known_by_totals_are_as_large_as_they_can_be(batches: int, largest: int, last: int) -> None:
    samples = (batches - 1) * largest + min(last, largest)
    found = [run.samples for run in workload(samples=samples, batches=batches, largest=largest).batch_runs()]
    assert len(found) == batches
    assert sum(found) == samples
    assert max(found) <= largest


def test_uncounted_sweeps_have_no_products() -> None:
    plan = SourcePlan("w", "w", ("w@fc",), "autograd", 12, 10, 1)
    assert tile_cost(source(), plan, Span(0, 12), OwnColumns(), workload(), ("hessian",)).products == 0
