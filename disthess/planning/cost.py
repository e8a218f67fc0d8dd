"""Work of one tile: its matrix products, exactly, and what is done entry by entry, about. In multiply-adds; pure integers.

COST.md beside this file has the formulas.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from disthess.planning.memory import CACHE_BYTES
from disthess.planning.source import OwnColumns, SourcePlan
from disthess.planning.work import ReverseWork, SharedWork, Work
from disthess.planning.workload import BatchRun, SourceCost, Workload
from disthess.types import Part, Span


@dataclass(frozen=True, slots=True)
class TileCost:
    """Multiply-adds of a tile.

    Attributes:
        products: In products of matrices and convolutions: what `torch.utils.flop_counter` counts, and what takes the time.
        entries: Entry by entry.
    """

    products: int
    entries: int

    @property
    def total(self) -> int:
        """Both."""
        return self.products + self.entries


def tile_cost(
    cost: SourceCost, plan: SourcePlan, span: Span, own: OwnColumns, workload: Workload, parts: Sequence[Part]
) -> TileCost:
    """Multiply-adds of the rows ``span`` of a source.

    Args:
        cost: The source's costs.
        plan: Its basis, stack and microbatch.
        span: Rows.
        own: Columns that it computes of its own block.
        workload: The problem.
        parts: Parts that are computed.
    """
    if plan.table_width:
        return _table_cost(cost, plan, span, workload, parts)
    units = Span(span.start // plan.unit_rows, -(-span.stop // plan.unit_rows))
    entries = workload.samples * units.size * len(parts) * _entries_per_unit(cost, plan)
    sizes = Counter({plan.stack: units.size // plan.stack})
    sizes[units.size % plan.stack] += 1 if units.size % plan.stack else 0
    products = 0
    for run, batches in Counter(workload.batch_runs()).items():
        for size, blocks in sizes.items():
            if blocks:
                products += batches * blocks * _block(cost, plan, size, run, workload, parts)
        products += batches * _back(cost, plan, run, parts)
        products += batches * _own_block(cost, plan, units, own, run, workload, parts)
    return TileCost(products, entries)


def _table_cost(cost: SourceCost, plan: SourcePlan, span: Span, workload: Workload, parts: Sequence[Part]) -> TileCost:
    """Each row of a table meets the samples that read it alone."""
    units = products = 0
    for batch, run in enumerate(workload.batch_runs()):
        sweeps = Counter(
            (block.size, cost.readers[batch][block.start // plan.table_width]) for block in plan.blocks(span)
        )
        for (size, samples), blocks in sweeps.items():
            units += blocks * size * samples
            products += blocks * _block(cost, plan, size, replace(run, samples=samples), workload, parts)
    return TileCost(products, units * len(parts) * _entries_per_unit(cost, plan))


def _entries_per_unit(cost: SourceCost, plan: SourcePlan) -> int:
    """Per sample and part."""
    if plan.basis == "output":
        return cost.unit_tangents * (cost.propagation + cost.apart_targets)
    return cost.propagation + (0 if plan.basis == "activation" else cost.summed_targets)


def _block(
    cost: SourceCost,
    plan: SourcePlan,
    units: int,
    run: BatchRun,
    workload: Workload,
    parts: Sequence[Part],
) -> int:
    """Products of so many units on one batch, but for the own block: one sweep per microbatch."""
    sweep = cost.sweep(plan.basis, run.graph)
    if sweep is None:
        return 0
    tangents = units * sweep.rows
    total = 0
    for place, samples in enumerate(_pieces(run.samples, plan.samples)):
        total += sweep.forward.at(tangents, samples)
        for wave in sweep.reverse:
            if wave.part in parts:
                total += (wave.later if place else wave.first).at(tangents, samples)
                total += samples * _repeated(sweep.rows, wave, units, samples, workload.dtype_bytes)
                total += samples * units * wave.per_unit
    return total * run.size // run.captured


def _own_block(
    cost: SourceCost,
    plan: SourcePlan,
    units: Span,
    own: OwnColumns,
    run: BatchRun,
    workload: Workload,
    parts: Sequence[Part],
) -> int:
    """Products on the source's own block, of all units on one batch."""
    sweep = cost.sweep(plan.basis, run.graph)
    if sweep is None or plan.basis != "output":
        return 0
    rows, whole, total = sweep.rows, cost.units - own.first, 0
    alone = _columns(units, cost.units, own, 1) if sweep.layer_rows > 1 else units.size * whole
    for wave in sweep.reverse:
        if wave.part not in parts:
            continue
        for samples in _pieces(run.samples, plan.samples):
            if wave.own:
                total += samples * sweep.apart * rows * alone * _own(sweep.layer_rows, plan.unit_rows)
            if wave.shared != SharedWork():
                group = max(1, CACHE_BYTES // max(1, rows * samples * cost.rows * workload.dtype_bytes))
                formed = sum(_columns(block, cost.units, own, group) for block in plan.blocks(units))
                total += samples * rows * formed * wave.shared.forward
                total += samples * whole * plan.unit_rows * rows * wave.shared.back
                total += samples * whole * units.size * wave.shared.per_unit
    return total * run.size // run.captured


def _columns(units: Span, outputs: int, own: OwnColumns, group: int) -> int:
    """Outputs that rows are formed for, summed over units: of each group from its first unit on.

    >>> _columns(Span(0, 4), 6, OwnColumns(0, True), 2)
    20
    """
    if not own.upper:
        return units.size * (outputs - own.first)
    starts = range(units.start, units.stop, group)
    return sum((min(start + group, units.stop) - start) * (outputs - start) for start in starts)


def _back(cost: SourceCost, plan: SourcePlan, run: BatchRun, parts: Sequence[Part]) -> int:
    """Products of the waves back from all inputs of a source with several uses, on one batch."""
    sweep = cost.sweep(plan.basis, run.graph)
    if sweep is None or plan.basis != "output":
        return 0
    total = 0
    for wave in sweep.reverse:
        if wave.part in parts and wave.back != Work():
            for samples in _pieces(run.samples, plan.samples):
                total += sum(wave.back.at(size * sweep.rows, samples) for size in _pieces(plan.unit_rows, plan.stack))
    return total * run.size // run.captured


def _pieces(whole: int, size: int) -> list[int]:
    """Sizes that a whole is cut into.

    >>> _pieces(7, 3)
    [3, 3, 1]
    """
    return [size] * (whole // size) + [whole % size] * (whole % size > 0)


def _own(rows: int, width: int) -> int:
    """Of the own block of a source with one use, per sample, tangent and output: pairs of inputs, or rows times inputs."""
    return width * (width + 1) // 2 if rows == 1 else width * (rows + width)


def _repeated(rows: int, wave: ReverseWork, units: int, samples: int, dtype_bytes: int) -> int:
    """Per sample: what is done anew for each group of units whose rows fit the cache."""
    total = 0
    for entries, again in wave.repeated:
        group = max(1, CACHE_BYTES // max(1, rows * samples * entries * dtype_bytes))
        total += again * -(-units // group)
    return total
