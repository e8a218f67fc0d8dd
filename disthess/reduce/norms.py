"""Norms and traces of every block, in one pass over the store."""

from __future__ import annotations

import math
from dataclasses import dataclass

import dask
import dask.array as da
import numpy as np

from disthess.reduce.arrays import PanelReader, lazy_block


@dataclass(frozen=True, slots=True)
class BlockRow:
    """One pair of parameters.

    Attributes:
        a: Earlier parameter in user order.
        b: Later one, or the same.
        norm: Frobenius norm of the block.
        trace: Of a diagonal block; NaN of others.
        numel: Entries of the block.
    """

    a: str
    b: str
    norm: float
    trace: float
    numel: int


@dataclass(frozen=True, slots=True)
class BlockTable:
    """Every block's norm.

    Attributes:
        names: Parameters in user order.
        entries: Pairs, each once.
    """

    names: tuple[str, ...]
    entries: tuple[BlockRow, ...]

    def rows(self) -> tuple[BlockRow, ...]:
        """Largest Frobenius norm first."""
        return tuple(sorted(self.entries, key=lambda row: -row.norm))

    def matrix(self) -> np.ndarray:
        """Frobenius norms, ``[parameters, parameters]``, symmetric."""
        place = {name: index for index, name in enumerate(self.names)}
        found = np.zeros((len(self.names), len(self.names)))
        for row in self.entries:
            found[place[row.a], place[row.b]] = found[place[row.b], place[row.a]] = row.norm
        return found

    @property
    def frobenius(self) -> float:
        """Frobenius norm of the whole matrix."""
        return math.sqrt(sum(row.norm**2 * (1 if row.a == row.b else 2) for row in self.entries))

    @property
    def trace(self) -> float:
        """Trace of the whole matrix."""
        return math.fsum(row.trace for row in self.entries if row.a == row.b)


def block_table(reader: PanelReader) -> BlockTable:
    """Frobenius norm of every block and trace of every diagonal one, in float64, by Dask."""
    parameters = list(reader.parameters.values())
    pairs = [(a, b) for i, a in enumerate(parameters) for b in parameters[i:]]
    tasks = []
    for a, b in pairs:
        values = lazy_block(reader, a, b).astype("float64")
        tasks.append((da.sum(values * values), da.trace(values) if a is b else np.float64("nan")))
    results = dask.compute(*tasks, scheduler="threads")
    entries = tuple(
        BlockRow(a.name, b.name, math.sqrt(float(square)), float(trace), a.numel * b.numel)
        for (a, b), (square, trace) in zip(pairs, results, strict=True)
    )
    return BlockTable(tuple(parameter.name for parameter in parameters), entries)
