"""Upper bounds of memory, from integers."""

from __future__ import annotations

from disthess.planning.source import SourcePlan
from disthess.planning.workload import SourceCost, Workload

CACHE_BYTES = 4 << 20
"""Bytes of per-sample rows that the output basis forms at a time."""

WORKSPACE_BYTES = 96 << 20
"""Allowance for linear algebra libraries, allocator slack and the store's own buffers."""

LIBRARY_BYTES = 256 << 20
"""Allowance for what a worker loads lazily: kernels, threads, function transforms."""


def tile_memory_bytes(
    cost: SourceCost, plan: SourcePlan, rows: int, array_bytes: int, buffer_columns: int, workload: Workload, parts: int
) -> int:
    """What computing and writing one tile adds to a worker, at most.

    Args:
        cost: The source's cost.
        plan: Its stack and microbatch.
        rows: Rows of the tile.
        array_bytes: Bytes of the arrays it returns, all parts.
        buffer_columns: Columns of its buffers, over all keys.
        workload: The problem.
        parts: Number of parts.

    Returns:
        Buffers, arrays (with one copy on the way to the store), tangents of one block with one more of the cotangents, a
        generic operation's temporaries, per-sample rows, and a fixed allowance.
    """
    item = workload.dtype_bytes
    tangents = plan.stack * (cost.unit_tangents if plan.basis == "output" else 1)
    straddling = rows + (2 * plan.unit_rows if plan.basis == "output" else 0)
    buffers = straddling * buffer_columns * item * parts
    widest = max(cost.front_entries, 1)
    sweep = tangents * plan.samples * (2 * cost.tangent_entries + 8 * widest + 2 * cost.apart_entries) * item
    seeds = tangents * cost.rows * item if plan.basis == "parameter" else 0
    forming = 0
    if plan.basis == "output":
        sweep += tangents * plan.samples * cost.kept_entries * item
        forming = 4 * max(CACHE_BYTES, plan.samples * cost.apart * cost.unit_tangents * cost.columns * item)
        if cost.pooled:
            forming += 2 * tangents * plan.samples * plan.unit_rows * item
        if cost.unit_tangents == 1:
            # Blocks are summed in the order in which products leave them, and put in place once, at the end.
            forming += buffers
        if cost.diagonal:
            forming += straddling // plan.unit_rows * cost.units * plan.unit_rows * (plan.unit_rows + 1) // 2 * item
    if plan.basis == "autograd":
        sweep = 3 * tangents * workload.primal_bytes
    return buffers + 3 * array_bytes + sweep + 2 * seeds + forming + WORKSPACE_BYTES


def worker_memory_bytes(workload: Workload) -> int:
    """What a worker holds: model and batches (twice while loading), values and deltas, what rules keep of them, libraries."""
    return 2 * workload.model_bytes + 3 * workload.primal_bytes + LIBRARY_BYTES
