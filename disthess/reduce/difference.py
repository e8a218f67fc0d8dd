"""How far the blocks of two stores are from each other."""

from __future__ import annotations

import math
from dataclasses import dataclass

import dask
import numpy as np

from disthess.reduce.arrays import PanelReader, lazy_block


@dataclass(frozen=True, slots=True)
class BlockDifference:
    """One pair of parameters of two stores A and B.

    Attributes:
        a: Earlier parameter in user order.
        b: Later one, or the same.
        norm_a: Frobenius norm of A's block.
        norm_b: Of B's.
        distance: Frobenius norm of ``A - B``.
        relative: ``|A - B| / |A|``; 0 where both are zero, infinite where A alone is.
        trace_a: Trace of A's block; NaN off the diagonal.
        trace_b: Of B's.
        entries: Of the block.
    """

    a: str
    b: str
    norm_a: float
    norm_b: float
    distance: float
    relative: float
    trace_a: float
    trace_b: float
    entries: int


def block_differences(first: PanelReader, second: PanelReader) -> tuple[BlockDifference, ...]:
    """Every pair of the parameters that both have with the same shape, in float64; reads every tile once, few at a time.

    Raises:
        StoreError: Tiles are missing or damaged.
    """
    names = [
        name
        for name, parameter in first.parameters.items()
        if name in second.parameters and second.parameters[name].shape == parameter.shape
    ]
    return tuple(_difference(first, second, a, b) for index, a in enumerate(names) for b in names[index:])


def _difference(first: PanelReader, second: PanelReader, a: str, b: str) -> BlockDifference:
    blocks = [
        lazy_block(reader, reader.parameters[a], reader.parameters[b]).astype(np.float64) for reader in (first, second)
    ]
    sums = [(x**2).sum() for x in (*blocks, blocks[0] - blocks[1])]
    traces = [block.trace() for block in blocks] if a == b else [math.nan, math.nan]
    *squares, trace_a, trace_b = dask.compute(*sums, *traces, scheduler="threads")
    norm_a, norm_b, distance = (math.sqrt(float(square)) for square in squares)
    relative = distance / norm_a if norm_a else (math.inf if distance else 0.0)
    return BlockDifference(
        a, b, norm_a, norm_b, distance, relative, float(trace_a), float(trace_b), math.prod(blocks[0].shape)
    )
