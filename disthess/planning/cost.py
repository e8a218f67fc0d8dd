"""Work of one tile: its matrix products, exactly, and what is done entry by entry, about. In multiply-adds; pure integers.

COST.md beside this file has the formulas.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from disthess.planning.memory import CACHE_BYTES
from disthess.planning.source import SourcePlan
from disthess.planning.work import ReverseWork, Work
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
    cost: SourceCost, plan: SourcePlan, span: Span, skip: int, workload: Workload, parts: Sequence[Part]
) -> TileCost:
    """Multiply-adds of the rows ``span`` of a source.

    Args:
        cost: The source's costs.
        plan: Its basis, stack and microbatch.
        span: Rows.
        skip: Output units whose columns an earlier tile has stored, and that the tile leaves out of its own block.
        workload: The problem.
        parts: Parts that are computed.
    """
    if plan.table_width:
        return _table_cost(cost, plan, span, workload, parts)
    units = -(-span.stop // plan.unit_rows) - span.start // plan.unit_rows
    entries = workload.samples * units * len(parts) * _entries_per_unit(cost, plan)
    sizes = Counter({plan.stack: units // plan.stack})
    sizes[units % plan.stack] += 1 if units % plan.stack else 0
    products = 0
    for run, batches in Counter(workload.batch_runs()).items():
        for size, blocks in sizes.items():
            if blocks:
                products += batches * blocks * _block(cost, plan, size, skip, run, workload, parts)
        products += batches * _back(cost, plan, run, parts)
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
            products += blocks * _block(cost, plan, size, 0, replace(run, samples=samples), workload, parts)
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
    skip: int,
    run: BatchRun,
    workload: Workload,
    parts: Sequence[Part],
) -> int:
    """Products of so many units on one batch: one sweep per microbatch."""
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
                if wave.own:
                    total += samples * tangents * (cost.units - skip) * _own(sweep.rows, plan.unit_rows)
    return total * run.size // run.captured


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
    """Of the source's own block, per sample, tangent and output: pairs of inputs, or rows and their products with inputs."""
    return width * (width + 1) // 2 if rows == 1 else width * (rows + width)


def _repeated(rows: int, wave: ReverseWork, units: int, samples: int, dtype_bytes: int) -> int:
    """Per sample: what is done anew for each group of units whose rows fit the cache."""
    total = 0
    for entries, again in wave.repeated:
        group = max(1, CACHE_BYTES // max(1, rows * samples * entries * dtype_bytes))
        total += again * -(-units // group)
    return total
