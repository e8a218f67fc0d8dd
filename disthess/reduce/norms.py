"""Norms and traces of every block, in one pass over the store."""

from __future__ import annotations

import math
import uuid
from dataclasses import dataclass
from typing import Any

import dask
import numpy as np

from disthess.reduce.arrays import Band, PanelReader
from disthess.reduce.scheduler import scheduler_of

BANDS_AT_ONCE = 4
"""Bands in memory at a time."""


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


def block_table(reader: PanelReader, client: Any = None) -> BlockTable:
    """Frobenius norm of every block and trace of every diagonal one, in float64, by Dask; reads every tile once.

    Args:
        reader: Of what.
        client: A ``dask.distributed`` Client whose workers read; None for threads of this process. Same numbers.
    """
    bands = list(reader.bands())
    # One node of the graph, so that a Client ships the reader once and not with every band.
    shared = dask.delayed(reader, name=f"reader-{uuid.uuid4().hex}", traverse=False)
    tasks = [dask.delayed(_band_sums, pure=False, traverse=False)(shared, band) for band in bands]
    squares: dict[frozenset[str], float] = {}
    traces: dict[str, float] = {}
    # Few at once: each holds a band.
    found = dask.compute(*tasks, scheduler=scheduler_of(client), num_workers=BANDS_AT_ONCE)
    for band, (sums, trace) in zip(bands, found, strict=True):
        source = band.panel.source
        traces[source] = traces.get(source, 0.0) + trace
        for (target, _), value in zip(band.panel.targets, sums, strict=True):
            pair = frozenset((source, target))
            squares[pair] = squares.get(pair, 0.0) + value
    parameters = list(reader.parameters.values())
    for parameter in parameters:
        if reader.unreached(parameter):
            squares[frozenset((parameter.name,))] = parameter.numel * reader.unreached(parameter) ** 2
            traces[parameter.name] = parameter.numel * reader.unreached(parameter)
    entries = tuple(
        BlockRow(
            a.name,
            b.name,
            math.sqrt(squares.get(frozenset((a.name, b.name)), 0.0)),
            traces.get(a.name, 0.0) if a is b else math.nan,
            a.numel * b.numel,
        )
        for i, a in enumerate(parameters)
        for b in parameters[i:]
    )
    return BlockTable(tuple(parameter.name for parameter in parameters), entries)


def _band_sums(reader: PanelReader, band: Band) -> tuple[list[float], float]:
    """Sum of squares of each target's block over these rows, and the trace of the own square."""
    values, size = reader.band(band), band.rows.size
    sums = []
    column = -band.rows.start
    for target, width in band.panel.targets:
        piece = values[:, max(column, 0) : column + width]
        total = _square_sum(piece)
        # What lies right of the own square stands for its transpose below it as well.
        sums.append(total + _square_sum(piece[:, size:]) if target == band.panel.source else total)
        column += width
    return sums, float(np.trace(values[:, :size], dtype=np.float64))


def _square_sum(values: np.ndarray) -> float:
    return float(np.square(values, dtype=np.float64).sum())
