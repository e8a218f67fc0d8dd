"""Rows per tile, chunks, stacks and microbatches: pure functions of integers.

Nothing here looks at the machine, so that a store's layout and bytes do not depend on where it was computed.
"""

from __future__ import annotations

from dataclasses import dataclass

from disthess.planning.source import Basis, SourcePlan
from disthess.planning.workload import SourceCost

TILE_BYTES = 24 << 20
"""Aim for the bytes that one tile writes, all parts together."""

CHUNK_BYTES = 8 << 20
"""Aim for the bytes of one chunk."""

STACK_BYTES = 48 << 20
"""Aim for the bytes of all tangents of one block of a stack on one microbatch."""

WIDEST_BYTES = 8 << 20
"""Most bytes of one value's tangents in a stack, where one tangent is smaller: beyond, every pass over them leaves the cache."""

MICROBATCH = 512
"""Samples per microbatch, at most: enough for products to run at full speed."""

LARGE_MICROBATCH = 2048
"""The same in the output basis, where every microbatch passes once more over all of a tile's sums,"""

ROWS_BYTES = 96 << 20
"""and where rows of all targets, of one unit on one microbatch, take no more than this."""

LARGE, FEW_TILES = 4, 4
"""Where every tile does some work anew: how many times larger tiles may be, and how many are left at least."""

MAX_ROWS = 1024
"""Rows per tile, at most (more only where one output unit yields more)."""


@dataclass(frozen=True, slots=True)
class RowTiling:
    """Rows per tile and the chunk shape.

    Attributes:
        rows: Rows per tile; a multiple of ``row_chunk``.
        row_chunk: Rows per chunk.
        column_chunk: Columns per chunk.
    """

    rows: int
    row_chunk: int
    column_chunk: int


def tile_rows(rows: int, columns: int, unit_rows: int, bytes_per_column: int, *, large: bool = False) -> RowTiling:
    """Rows per tile and chunks of a panel.

    Args:
        rows: ``p_source``.
        columns: Of the widest panel that the tile writes.
        unit_rows: Rows that come together (the layer's inputs in the output basis, else 1).
        bytes_per_column: Bytes that one row writes per column, all parts.
        large: Whether every tile does some work anew: larger ones then.

    Returns:
        Whole units per tile, and whole chunks per tile.

    >>> tile_rows(4096, 8970, 64, 4)
    RowTiling(rows=640, row_chunk=640, column_chunk=2990)
    >>> [tile_rows(9216, 10282, 96, 4, large=large).rows for large in (False, True)]
    [576, 2304]
    """
    fitting = max(1, TILE_BYTES // max(1, columns * bytes_per_column))
    units = max(1, min(fitting, MAX_ROWS) // unit_rows)
    whole_units = -(-rows // unit_rows)
    if large:
        units = max(units, min(units * LARGE, whole_units // FEW_TILES))
    # Even tiles and chunks: the last chunk of an axis is stored at full size.
    units = -(-whole_units // -(-whole_units // units))
    chosen = min(units * unit_rows, rows)
    row_chunk = chosen if chosen <= 2 * MAX_ROWS else _divisor(chosen)
    wanted = max(256, CHUNK_BYTES // (row_chunk * 4))
    column_chunk = -(-columns // max(1, round(columns / wanted)))
    return RowTiling(chosen, row_chunk, column_chunk)


def _microbatch(cost: SourceCost, basis: Basis, dtype_bytes: int) -> int:
    """Samples at most."""
    if basis != "output":
        return MICROBATCH
    rows = ROWS_BYTES // max(1, cost.apart * cost.unit_tangents * cost.columns * dtype_bytes)
    return max(MICROBATCH, min(LARGE_MICROBATCH, rows))


def _even(whole: int, most: int) -> int:
    """Samples per microbatch, of equal microbatches as near as can be.

    >>> _even(32, 24), _even(1797, 512)
    (16, 450)
    """
    return -(-whole // -(-whole // most))


def _divisor(rows: int) -> int:
    """The largest divisor of ``rows`` up to ``MAX_ROWS``, if it is of useful size; else ``rows`` itself."""
    best = max(size for size in range(1, MAX_ROWS + 1) if rows % size == 0)
    return best if best >= 64 else rows


def source_plan(cost: SourceCost, basis: Basis, tile: int, largest_batch: int, dtype_bytes: int) -> SourcePlan:
    """Stack and microbatch of a source, so that its tangents stay near ``STACK_BYTES``.

    Args:
        cost: The source's cost.
        basis: Chosen basis.
        tile: Rows per tile.
        largest_batch: Samples of the largest batch.
        dtype_bytes: Bytes per number.
    """
    unit_rows = cost.unit_rows if basis in ("output", "activation") else 1
    table_width = cost.table_width if basis == "parameter" else 0
    if table_width:
        tile = min(tile, table_width)
        largest_batch = max(1, *(readers for batch in cost.readers for readers in batch))
    tangents = cost.unit_tangents if basis == "output" else 1
    entries = max(1, cost.tangent_entries + 2 * cost.front_entries + cost.apart_entries)
    room = max(1, STACK_BYTES // (entries * dtype_bytes * tangents))
    room = max(1, min(room, WIDEST_BYTES // max(1, cost.front_entries * dtype_bytes * tangents)))
    units = -(-tile // unit_rows)
    samples = max(1, min(largest_batch, _microbatch(cost, basis, dtype_bytes), room))
    samples = _even(largest_batch, samples)
    stack = max(1, min(units, room // samples))
    if stack < 8 <= units and samples > 32:
        samples = _even(largest_batch, max(32, min(samples, room // 8)))
        stack = max(1, min(units, room // samples))
    return SourcePlan(cost.source, cost.parameter, cost.uses, basis, stack, samples, unit_rows, table_width)
