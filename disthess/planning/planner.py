"""From a workload to a plan: which panels, which basis, which tiles, whose.

1. Sharing: per-use panels where they cost at most four times the summed ones, else sums.
2. Per source: basis by cost, rows per tile, stack and microbatch.
3. Tiles in waves of reverse topological level, longest first inside a wave, given to the worker with least to do.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence
from typing import Literal, final

from disthess.errors import PlanError
from disthess.planning.cost import TileCost, tile_cost
from disthess.planning.memory import tile_memory_bytes, worker_memory_bytes
from disthess.planning.plan import Plan
from disthess.planning.source import Basis, OwnColumns, SourcePlan, activation_source, own_columns
from disthess.planning.tiling import RowTiling, source_plan, tile_rows
from disthess.planning.workload import SourceCost, Workload
from disthess.store.layout import Layout, PanelKind, PanelSpec, Tile
from disthess.types import DType, Part, Span
from disthess.units import human_bytes

Sharing = Literal["auto", "uses", "sum"]
Method = Literal["graph", "autograd"]


MAX_TILES = 1_000_000
"""More are refused: a plan holds some hundred bytes for each, and so does a store's metadata."""

SMALL_PRODUCTS = 2
"""Times longer that a multiply-add takes in the parameter basis, whose products are convolutions and many small matrices; those of
the output basis are a few large ones, where it takes at most half as many tangents."""

Targets = tuple[tuple[str, int], ...]
"""(name, numel) of each target, in column order."""


@dataclasses.dataclass(frozen=True, slots=True)
class PlanRequest:
    """What the user asked for.

    Attributes:
        parts: Parts to store.
        dtype: Of the panels.
        method: How panels are computed.
        method_reason: Why, in a sentence.
        shared: How shared parameters are swept.
        basis: Force a basis where it exists, or None for the cheaper.
        workers: Number of workers.
        threads: Threads per worker.
        device: Device name.
        not_checked: Of a problem without values, what could not be checked.
    """

    parts: tuple[Part, ...]
    dtype: DType
    method: Method
    method_reason: str
    shared: Sharing
    basis: Basis | None
    workers: int
    threads: int
    device: str
    not_checked: str = ""


def make_plan(workload: Workload, request: PlanRequest) -> Plan:
    """Plan a run.

    Args:
        workload: The problem in integers.
        request: What is wanted.

    Returns:
        The plan; nothing has been allocated or run.

    Raises:
        PlanError: ``shared="uses"`` was asked for where uses are not known; or there would be more than `MAX_TILES` tiles.
    """
    return _Planner(workload, request).plan()


@final
class _Planner:
    def __init__(self, workload: Workload, request: PlanRequest) -> None:
        self._work = workload
        self._request = request
        self._by_name = {parameter.name: parameter for parameter in workload.parameters}
        self._ordered = sorted((p for p in workload.parameters if p.uses), key=lambda parameter: parameter.rank)
        self._panels: list[PanelSpec] = []
        self._outputs: dict[str, list[tuple[PanelKind, int]]] = {}
        self._plans: list[SourcePlan] = []
        self._tiles: list[_Draft] = []

    def plan(self) -> Plan:
        apart = self._uses_apart()
        if apart:
            self._plan_apart()
        else:
            for cost in self._work.sources:
                self._source(cost, [("panels", self._targets(cost.parameter), True)])
        for position, cost in enumerate(self._work.activation_sources):
            later = tuple((entry.name, entry.numel) for entry in self._work.activations[position:])
            self._source(cost, [("activations", later, False)])
        tiles, product_flops = self._order()
        layout = Layout(
            self._work.parameters,
            tuple(self._panels),
            tuple((name, tuple(keys)) for name, keys in self._outputs.items()),
            tiles,
            self._request.parts,
            self._request.dtype,
            self._work.activations,
            self._work.activation_samples,
        )
        return Plan(
            title=self._work.title,
            layout=layout,
            sources=tuple(self._plans),
            method=self._request.method,
            method_reason=self._request.method_reason,
            sharing="uses" if apart else "sum" if any(len(p.uses) > 1 for p in self._ordered) else "none",
            independence=self._work.why,
            samples=self._work.data_samples,
            batches=self._work.batches,
            workers=self._request.workers,
            threads=self._request.threads,
            device=self._request.device,
            worker_bytes=worker_memory_bytes(self._work),
            tile_product_flops=product_flops,
            not_checked=self._request.not_checked,
        )

    def _uses_apart(self) -> bool:
        shared = [p for p in self._ordered if len(p.uses) > 1]
        if self._request.shared == "uses" and shared and not self._work.use_sources:
            raise PlanError(
                "shared='uses' needs one captured graph for all batches; these batches have different graphs, or the method is "
                "autograd. Use shared='sum'."
            )
        if self._request.shared == "sum" or not shared or not self._work.use_sources:
            return False
        if self._request.shared == "uses":
            return True
        total = sum(parameter.numel for parameter in self._ordered)
        uses = sum(parameter.numel * len(parameter.uses) for parameter in self._ordered)
        only = sum(parameter.numel * len(parameter.uses) for parameter in shared)
        stored = only * (only + 1) // 2 + only * (uses - only)
        return stored <= 4 * (total * (total + 1) // 2)

    def _plan_apart(self) -> None:
        use_costs = {cost.source: cost for cost in self._work.use_sources}
        order = [cost.source for cost in self._work.use_sources]
        shared = {
            name for cost in self._work.use_sources for name in cost.uses if len(self._by_name[cost.parameter].uses) > 1
        }
        sizes = {cost.source: cost.rows for cost in self._work.use_sources}
        for cost in self._work.sources:
            if len(self._by_name[cost.parameter].uses) > 1:
                self._reduced_panel(cost)
                continue
            outputs: list[tuple[PanelKind, Targets, bool]] = [("panels", self._targets(cost.parameter), True)]
            place = order.index(cost.uses[0])
            later = tuple((name, sizes[name]) for name in order[place:] if name in shared)
            if later:
                outputs.append(("uses", later, False))
            # A later use of an earlier parameter is a target too: the sweep is that of the use.
            self._source(dataclasses.replace(use_costs[cost.uses[0]], source=cost.source), outputs)
        for position, name in enumerate(order):
            if name in shared:
                later = tuple((other, sizes[other]) for other in order[position:])
                self._source(use_costs[name], [("uses", later, True)])

    def _targets(self, source: str) -> Targets:
        rank = self._by_name[source].rank
        return tuple((p.name, p.numel) for p in self._ordered if p.rank >= rank)

    def _reduced_panel(self, cost: SourceCost) -> None:
        tiling = self._tiling(cost, sum(size for _, size in self._targets(cost.parameter)), 1)
        self._panels.append(
            self._panel("panels", cost.parameter, cost.rows, self._targets(cost.parameter), tiling, True, True)
        )

    def _panel(
        self,
        kind: PanelKind,
        source: str,
        rows: int,
        targets: Targets,
        tiling: RowTiling,
        diagonal: bool,
        reduced: bool,
    ) -> PanelSpec:
        index = sum(panel.kind == kind for panel in self._panels)
        columns = sum(size for _, size in targets)
        chunk = min(tiling.column_chunk, columns)
        return PanelSpec(kind, index, source, rows, targets, tiling.row_chunk, chunk, diagonal, reduced)

    def _tiling(self, cost: SourceCost, columns: int, unit_rows: int, *, large: bool = False) -> RowTiling:
        return tile_rows(cost.rows, columns, unit_rows, self._work.dtype_bytes * len(self._request.parts), large=large)

    def _source(self, cost: SourceCost, outputs: Sequence[tuple[PanelKind, Targets, bool]]) -> None:
        parts = self._request.parts
        widest = max(sum(size for _, size in targets) for _, targets, _ in outputs)
        plan, tiling = self._sweep(cost, widest, apart=any(kind == "uses" for kind, _, _ in outputs))
        self._check_count(cost, widest, -(-cost.rows // tiling.rows))
        self._plans.append(plan)
        panels = []
        for kind, targets, diagonal in outputs:
            name = cost.uses[0] if kind == "uses" else cost.parameter
            panels.append(self._panel(kind, name, cost.rows, targets, tiling, diagonal, False))
            self._panels.append(panels[-1])
        self._outputs[cost.source] = [(panel.kind, panel.index) for panel in panels]
        columns = [panel.columns for panel in panels]
        buffer_columns = sum(columns)
        known: dict[tuple[int, OwnColumns], TileCost] = {}
        for start in range(0, cost.rows, tiling.rows):
            span = Span(start, min(start + tiling.rows, cost.rows))
            written = sum(
                span.size * (wide - panel.first_column(start)) for panel, wide in zip(panels, columns, strict=True)
            )
            written *= len(parts) * self._work.dtype_bytes
            own = own_columns(plan, panels, start)
            # Tiles of as many whole units cost the same, but those of tables, whose rows have readers of their own.
            key = (span.size if plan.table_width == 0 and start % plan.unit_rows == 0 else -start, own)
            if key not in known:
                known[key] = tile_cost(cost, plan, span, own, self._work, parts)
            done = known[key]
            memory = tile_memory_bytes(cost, plan, span.size, written, buffer_columns, self._work, len(parts))
            tile = Tile(0, cost.source, span, 0, 0, 2 * done.total, written, memory)
            self._tiles.append(_Draft(cost.level, tile, 2 * done.products))

    def _sweep(self, cost: SourceCost, columns: int, *, apart: bool) -> tuple[SourcePlan, RowTiling]:
        """The cheapest way to sweep a source, by multiply-adds and how fast they are; ``apart``: uses are stored apart."""
        ways = []
        few = 2 * cost.unit_tangents * len(cost.uses) <= cost.unit_rows
        for basis in self._bases(cost):
            unit_rows = cost.unit_rows if basis in ("output", "activation") else 1
            # Waves back from a layer's inputs are the same for every tile.
            tiling = self._tiling(cost, columns, unit_rows, large=basis == "output" and len(cost.uses) > 1)
            plan = source_plan(cost, basis, tiling.rows, self._work.largest_batch, self._work.dtype_bytes)
            # Tiles leave out the columns of their own block that earlier ones have: on average, half of what the last one does.
            skip = (cost.rows - tiling.rows) // (2 * plan.unit_rows)
            own = OwnColumns(skip, basis == "output" and not apart)
            whole = tile_cost(cost, plan, Span(0, cost.rows), own, self._work, self._request.parts)
            anew = tile_cost(cost, plan, Span(0, 0), own, self._work, self._request.parts).products
            products = whole.products + (-(-cost.rows // tiling.rows) - 1) * anew
            slowness = SMALL_PRODUCTS if basis == "parameter" and few else 1
            ways.append((products * slowness + whole.entries, plan, tiling))
        _, plan, tiling = min(ways, key=lambda way: way[0])
        return plan, tiling

    def _check_count(self, cost: SourceCost, columns: int, tiles: int) -> None:
        if len(self._tiles) + tiles <= MAX_TILES:
            return
        row = columns * self._work.dtype_bytes * len(self._request.parts)
        numel = sum(parameter.numel for parameter in self._ordered)
        raise PlanError(
            f"the Hessian of the {numel:,} parameters asked for would take more than {MAX_TILES:,} tiles: {cost.source} alone has "
            f"{cost.rows:,} rows of {human_bytes(row)} each, in {tiles:,} tiles. Select fewer parameters."
        )

    def _bases(self, cost: SourceCost) -> tuple[Basis, ...]:
        """What a source may be swept from; of equal ones the first is taken."""
        if cost.source == activation_source(cost.parameter):
            return ("activation",)
        if self._request.method == "autograd":
            return ("autograd",)
        if self._request.basis == "parameter" or cost.units == 0:
            return ("parameter",)
        return ("output",) if self._request.basis == "output" else ("parameter", "output")

    def _order(self) -> tuple[tuple[Tile, ...], tuple[int, ...]]:
        """Tiles in ledger order, with their owners, and the products of each."""
        waves = {level: wave for wave, level in enumerate(sorted({draft.level for draft in self._tiles}))}
        ordered = sorted(self._tiles, key=lambda draft: (waves[draft.level], -draft.tile.flops))
        # The worker with least to do comes first; of equal ones, the first.
        load = [(0, worker) for worker in range(self._request.workers)]
        tiles = []
        for index, draft in enumerate(ordered):
            flops, owner = load[0]
            heapq.heapreplace(load, (flops + draft.tile.flops, owner))
            tiles.append(dataclasses.replace(draft.tile, index=index, wave=waves[draft.level], owner=owner))
        return tuple(tiles), tuple(draft.product_flops for draft in ordered)


@dataclasses.dataclass(frozen=True, slots=True)
class _Draft:
    """A tile without its place in the ledger, its source's level, and the part of its work that is matrix products."""

    level: int
    tile: Tile
    product_flops: int
