"""Plans of random workloads: every row of every source once, whole chunks, balanced owners, and numbers that add up."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from disthess.planning.planner import PlanRequest, make_plan
from disthess.planning.workload import SourceCost, Workload
from disthess.store.check_layout import check_layout
from disthess.store.layout import ParameterSpec


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    shapes = draw(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 70)), min_size=1, max_size=6))
    uses = [draw(st.integers(0, 2)) for _ in shapes]
    if not any(uses):
        uses[0] = 1
    specs, order = [], []
    for rank, ((o, i), count) in enumerate(zip(shapes, uses, strict=True)):
        names = tuple(f"p{rank}@n{rank}.{use}" for use in range(count))
        specs.append(ParameterSpec(f"p{rank}", (), (o, i), rank, names))
        order += [(name, rank) for name in names]
    total = sum(o * i for o, i in shapes)

    def cost(source: str, rank: int, names: tuple[str, ...]) -> SourceCost:
        o, i = shapes[rank]
        linear = draw(st.booleans()) and len(names) == 1
        return SourceCost(
            source, f"p{rank}", names, len(shapes) - rank, o * i, o if linear else 0, i if linear else 0, 1 if linear else 0,
            draw(st.integers(1, 10**5)), draw(st.integers(1, 10**5)), 10**4, total, linear, 500, 64, 0,
        )  # fmt: skip

    sources = tuple(cost(spec.name, spec.rank, spec.uses) for spec in specs if spec.uses)
    apart = tuple(cost(name, rank, (name,)) for name, rank in order) if max(uses) > 1 else ()
    samples = draw(st.integers(1, 3000))
    item = draw(st.sampled_from([4, 8]))
    return Workload("toy", tuple(specs), sources, apart, samples, samples, 1, samples, True, "", 1000, 1000, item)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(workloads(), st.sampled_from(["auto", "uses", "sum"]), st.integers(1, 5), st.booleans())
def test_a_plan_covers_every_row_once(workload: Workload, shared: str, workers: int, both: bool) -> None:
    if shared == "uses" and not workload.use_sources:
        shared = "auto"
    dtype = "float32" if workload.dtype_bytes == 4 else "float64"
    parts = ("hessian", "ggn") if both else ("hessian",)
    plan = make_plan(workload, PlanRequest(parts, dtype, "graph", "", shared, None, workers, 1, "cpu"))
    check_layout(plan.layout)
    rows = {source.source: 0 for source in plan.sources}
    for tile in sorted(plan.layout.tiles, key=lambda tile: tile.span.start):
        assert tile.span.start == rows[tile.source]
        rows[tile.source] = tile.span.stop
    for source in plan.sources:
        assert all(panel.rows == rows[source.source] for panel in plan.layout.panels_of(source.source))
        assert source.stack >= 1 <= source.samples
    assert {tile.owner for tile in plan.layout.tiles} <= set(range(workers))
    assert [tile.index for tile in plan.layout.tiles] == list(range(len(plan.layout.tiles)))
    assert [tile.wave for tile in plan.layout.tiles] == sorted(tile.wave for tile in plan.layout.tiles)
    assert plan.flops == sum(tile.flops for tile in plan.layout.tiles)
    assert json.loads(json.dumps(plan.to_json()))["disk_bytes"] == plan.disk_bytes
    assert f"P = {plan.layout.numel:,}" in plan.describe()


def test_owners_do_not_change_what_is_stored() -> None:
    spec = ParameterSpec("w", (), (40, 50), 0, ("w@fc",))
    cost = SourceCost("w", "w", ("w@fc",), 1, 2000, 40, 50, 1, 100, 100, 100, 2000, True, 10, 10, 0)
    work = Workload("toy", (spec,), (cost,), (), 100, 100, 1, 100, True, "", 1, 1, 4)
    plans = [
        make_plan(work, PlanRequest(("hessian",), "float32", "graph", "", "auto", None, workers, 1, "cpu"))
        for workers in (1, 4)
    ]
    assert plans[0].layout.panels == plans[1].layout.panels
    assert plans[0].sources == plans[1].sources
    assert [(t.source, t.span) for t in plans[0].layout.tiles] == [(t.source, t.span) for t in plans[1].layout.tiles]
