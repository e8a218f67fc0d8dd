"""A matrix that is known, a diagonal and a few outliers, and a store of it as large as wanted, written without a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import final

import numpy as np

from disthess.linalg.operator import AbstractSymmetricOperator
from disthess.planning.tiling import tile_rows
from disthess.store.layout import Layout, PanelSpec, ParameterSpec, Tile, TileRecord
from disthess.store.store import Store
from disthess.types import Span

SHARES = (("fc1.weight", 0.6), ("fc1.bias", 0.01), ("fc2.weight", 0.3), ("fc2.bias", 0.005), ("fc3.weight", 0.085))
"""Parameters, and their shares of P."""
OUTLIERS = np.concatenate([40.0 * 0.6 ** np.arange(6), -8.0 * 0.6 ** np.arange(6)])
BULK = 0.05
"""Scale of the Laplace distribution of the diagonal."""


@final
class Model(AbstractSymmetricOperator):
    """``diag(d) + U diag(s) U^T`` in float64: the matrix that the store holds, before its entries were rounded."""

    def __init__(self, size: int) -> None:
        generator = np.random.default_rng(0)
        self.diagonal = generator.laplace(scale=BULK, size=size)
        self.outer = np.linalg.qr(generator.standard_normal((size, len(OUTLIERS))))[0]

    @property
    def size(self) -> int:
        return len(self.diagonal)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float64)

    def matmat(self, block: np.ndarray) -> np.ndarray:
        return self.diagonal[:, None] * block + (self.outer * OUTLIERS) @ (self.outer.T @ block)

    def rows(self, start: int, stop: int, first: int) -> np.ndarray:
        """Rows ``[start, stop)`` from column ``first`` on, float64."""
        values = (self.outer[start:stop] * OUTLIERS) @ self.outer[first:].T
        values[np.arange(stop - start), np.arange(start, stop) - first] += self.diagonal[start:stop]
        return values


def write_store(place: Path, model: Model, dtype: str) -> Store:
    """The model's store, tiles and chunks as the planner would choose them."""
    sizes = [max(1, int(share * model.size)) for _, share in SHARES]
    sizes[0] += model.size - sum(sizes)
    parameters, panels, tiles = [], [], []
    offset = 0
    for rank, ((name, _), numel) in enumerate(zip(SHARES, sizes)):
        parameters.append(ParameterSpec(name, (), (numel,), rank, (f"{name}@0",)))
        targets = tuple((other, width) for (other, _), width in zip(SHARES[rank:], sizes[rank:]))
        tiling = tile_rows(numel, model.size - offset, 1, np.dtype(dtype).itemsize)
        chunks = (tiling.row_chunk, tiling.column_chunk)
        panels.append(PanelSpec("panels", rank, name, numel, targets, *chunks, diagonal=True))
        for start in range(0, numel, tiling.rows):
            tiles.append(Tile(len(tiles), name, Span(start, min(start + tiling.rows, numel)), 0, 0, 1, 1, 1))
        offset += numel
    outputs = tuple((panel.source, ((panel.kind, panel.index),)) for panel in panels)
    layout = Layout(tuple(parameters), tuple(panels), outputs, tuple(tiles), ("hessian",), dtype)  # type: ignore[arg-type]
    store = Store.create(place, layout, {"fingerprint": {}})
    records = [write_tile(store, model, tile, dtype) for tile in tiles]
    store.mark(records)
    store.mark_reduced()
    return store


def write_tile(store: Store, model: Model, tile: Tile, dtype: str) -> TileRecord:
    """Write one tile."""
    (panel,) = store.layout.panels_of(tile.source)
    offset = model.size - panel.columns
    first = offset + panel.first_column(tile.span.start)
    values = model.rows(offset + tile.span.start, offset + tile.span.stop, first).astype(dtype)
    checksum, written = store.write_tile(tile, {"hessian": [values]})
    return TileRecord(tile.index, checksum, 0.0, written, 0, 0)
