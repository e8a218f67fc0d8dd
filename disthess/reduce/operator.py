"""The stored Hessian as a symmetric operator: every tile is read once per product and used for both triangles."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import final

import numpy as np
import psutil
from typing_extensions import override

from disthess.linalg.operator import AbstractSymmetricOperator
from disthess.reduce.arrays import PanelReader

READERS = 4
"""Bands read ahead."""

CACHE_SHARE = 0.25
"""Share of free memory in which bands are kept between products, if all of them fit."""


@final
class StoreOperator(AbstractSymmetricOperator):
    """``x -> H x`` in user order.

    Args:
        reader: The store and part.
        cache_bytes: Keep bands in memory (float64) if they need no more than this; default a quarter of what is free.
    """

    def __init__(self, reader: PanelReader, cache_bytes: int | None = None) -> None:
        self._reader = reader
        self._bands = tuple(reader.bands())
        self._index = reader.positions()
        self._unreached = reader.unreached_diagonal()
        whole = sum(band.rows.size * (band.panel.columns - band.rows.start) for band in self._bands) * 8
        room = int(psutil.virtual_memory().available * CACHE_SHARE) if cache_bytes is None else cache_bytes
        self._cache: dict[int, np.ndarray] | None = {} if whole <= room else None

    @property
    @override
    def size(self) -> int:
        return self._reader.store.layout.numel

    @property
    @override
    def dtype(self) -> np.dtype:
        return np.dtype(self._reader.store.layout.dtype)

    @override
    def matmat(self, block: np.ndarray) -> np.ndarray:
        """``H X``, ``[P, k]`` from ``[P, k]``, summed in a fixed order."""
        vectors = np.ascontiguousarray(block, dtype=np.float64)
        total = vectors * self._unreached[:, None]
        # Threads read ahead; products are done here, one at a time, with all threads of the linear algebra library.
        with ThreadPoolExecutor(READERS) as pool:
            numbered = iter(range(len(self._bands)))
            while chunk := list(islice(numbered, READERS)):
                for number, tile in zip(chunk, pool.map(self._tile, chunk), strict=True):
                    band = self._bands[number]
                    columns, size = self._index[band.panel.source], band.rows.size
                    inside = vectors[columns[band.rows.start : band.rows.stop]]
                    total[columns[band.rows.start : band.rows.stop]] += tile @ vectors[columns[band.rows.start :]]
                    total[columns[band.rows.stop :]] += (inside.T @ tile[:, size:]).T
        return total

    def _tile(self, number: int) -> np.ndarray:
        if self._cache is not None and number in self._cache:
            return self._cache[number]
        tile = self._reader.band(self._bands[number])
        if self._cache is not None:
            # Products are in float64; converting once is cheaper than at every product.
            tile = tile.astype(np.float64)
            self._cache[number] = tile
        return tile
