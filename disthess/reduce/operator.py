"""The stored Hessian as a symmetric operator: every chunk is read once per product and used for both triangles.

Threads take chunks; each reads one from its file piece by piece into memory of its own, checks its checksum, and multiplies every
piece while it is in the cache. Shares of chunks are added in one order, whatever the number of threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from queue import SimpleQueue
from typing import final

import numpy as np
import psutil
from typing_extensions import override

from disthess.execute.threads import usable_cores
from disthess.linalg.operator import AbstractSymmetricOperator
from disthess.reduce.arrays import PanelReader
from disthess.reduce.chunks import Chunk, ChunkFiles, aligned, needed_chunks
from disthess.reduce.products import ChunkShare, take_diagonal
from disthess.types import DType

CACHE_SHARE = 0.25
"""Share of free memory in which chunks are kept between products, if all of them fit."""

AHEAD = 2
"""Chunks per thread that are under way or wait for their turn to be added."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of a chunk as they are multiplied.

    Attributes:
        start: First row, counted from the chunk's first.
        values: ``[rows, columns]``, zero on and below the matrix's diagonal.
        first: First row, counted from the chunk's first, whose diagonal entry lies in the piece.
        diagonal: Diagonal entries from there on.
    """

    start: int
    values: np.ndarray
    first: int
    diagonal: np.ndarray


@dataclass(frozen=True, slots=True)
class _Desk:
    """What one thread reads and converts in."""

    raw: list[np.ndarray]
    converted: np.ndarray | None


@final
class StoreOperator(AbstractSymmetricOperator):
    """``x -> H x`` in user order.

    Args:
        reader: The store and part.
        cache_bytes: Keep chunks in memory, in the dtype of multiplication, if they need no more than this; default a quarter of
            what is free.
        multiply: Dtype of products. ``float64`` multiplies the stored entries as they are. ``float32``, for a float32 store,
            takes a third of the time, and adds rounding of about ``5e-7 |H|_F |x| / sqrt(P)``; see `disthess.reduce.products`.
            A float64 store is always multiplied in float64.
        threads: Chunks read and multiplied at once; default the cores that may be used. The result does not depend on it.
    """

    def __init__(
        self,
        reader: PanelReader,
        cache_bytes: int | None = None,
        *,
        multiply: DType = "float64",
        threads: int | None = None,
    ) -> None:
        self._reader = reader
        self._chunks = needed_chunks(reader)
        self._files = ChunkFiles(reader)
        self._stored = np.dtype(reader.store.layout.dtype)
        self._multiply = np.dtype("float64") if self._stored == np.float64 else np.dtype(multiply)
        self._threads = usable_cores() if threads is None else max(1, threads)
        self._index = {source: _places(index) for source, index in reader.positions().items()}
        self._unreached = reader.unreached_diagonal()
        room = int(psutil.virtual_memory().available * CACHE_SHARE) if cache_bytes is None else cache_bytes
        self._cache: dict[int, list[_Piece]] | None = {} if self.cached_bytes <= room else None

    @property
    @override
    def size(self) -> int:
        return self._reader.store.layout.numel

    @property
    @override
    def dtype(self) -> np.dtype:
        return self._stored

    @property
    def cached_bytes(self) -> int:
        """Memory that all chunks take between products, where they are kept."""
        return sum(chunk.entries for chunk in self._chunks) * self._multiply.itemsize

    @property
    def read_bytes(self) -> int:
        """Bytes of all files that a product reads, where nothing is kept."""
        itemsize = self._stored.itemsize
        return sum(chunk.file_bytes(itemsize) for chunk in self._chunks) * len(self._reader.read_parts)

    @override
    def matmat(self, block: np.ndarray) -> np.ndarray:
        """``H X``, ``[P, k]`` from ``[P, k]``, float64, summed in a fixed order."""
        vectors = np.ascontiguousarray(block, dtype=np.float64)
        if not vectors.size:
            return np.zeros(vectors.shape)
        # Powers of two change no digit, and keep float32 from overflow and underflow.
        scale = _power_of_two(np.abs(vectors).max(axis=0))
        vectors = vectors / scale
        total = vectors * self._unreached[:, None]
        for number, share in self._in_order(vectors):
            rows, columns = self._spread(self._chunks[number])
            total[rows] += share.rows
            total[columns] += share.columns()
        return total * scale

    def _in_order(self, vectors: np.ndarray) -> Iterator[tuple[int, ChunkShare]]:
        """Shares of all chunks, in their order; few are in memory at a time."""
        desks: SimpleQueue[_Desk] = SimpleQueue()
        for _ in range(self._threads):
            desks.put(self._desk())
        numbers = iter(range(len(self._chunks)))
        waiting: deque[tuple[int, Future[ChunkShare]]] = deque()
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="disthess-products")
        try:
            while True:
                for number in islice(numbers, AHEAD * self._threads - len(waiting)):
                    waiting.append((number, pool.submit(self._share, number, vectors, desks)))
                if not waiting:
                    return
                number, future = waiting.popleft()
                yield number, future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _share(self, number: int, vectors: np.ndarray, desks: SimpleQueue[_Desk]) -> ChunkShare:
        chunk = self._chunks[number]
        rows, columns = self._spread(chunk)
        share = ChunkShare(
            chunk, vectors[columns], vectors[rows], self._multiply, chunk.piece_rows(self._stored.itemsize)
        )
        kept = None if self._cache is None else self._cache.get(number)
        if kept is not None:
            _add(share, kept)
            return share
        desk = desks.get()
        try:
            if self._cache is None:
                _add(share, self._read(chunk, desk))
            else:
                held = [replace(piece, values=piece.values.copy()) for piece in self._read(chunk, desk)]
                self._cache[number] = held
                _add(share, held)
        finally:
            desks.put(desk)
        return share

    def _read(self, chunk: Chunk, desk: _Desk) -> Iterator[_Piece]:
        for start, stored in self._files.pieces(chunk, desk.raw):
            first, diagonal = take_diagonal(chunk, start, stored)
            values = stored
            if desk.converted is not None:
                values = desk.converted.reshape(-1)[: stored.size].reshape(stored.shape)
                np.copyto(values, stored)
            yield _Piece(start, values, first, diagonal)

    def _desk(self) -> _Desk:
        raw = self._files.buffers(self._chunks)
        same = raw[0].dtype == self._multiply
        return _Desk(raw, None if same else aligned(raw[0].shape, self._multiply))

    def _spread(self, chunk: Chunk) -> tuple[slice | np.ndarray, slice | np.ndarray]:
        """Where the chunk's rows and columns are in user order: a slice where they are together there."""
        index = self._index[chunk.panel.source]
        return index.part(chunk.rows.start, chunk.rows.stop), index.part(chunk.columns.start, chunk.columns.stop)


@dataclass(frozen=True, slots=True)
class _Places:
    """Positions in user order of a panel's columns, and how many neighbours up to each are not next to each other there."""

    index: np.ndarray
    gaps: np.ndarray

    def part(self, start: int, stop: int) -> slice | np.ndarray:
        if stop > start and self.gaps[stop - 1] == self.gaps[start]:
            return slice(int(self.index[start]), int(self.index[start]) + stop - start)
        return self.index[start:stop]


def _add(share: ChunkShare, pieces: Iterable[_Piece]) -> None:
    for piece in pieces:
        share.add(piece.start, piece.values)
        share.add_diagonal(piece.first, piece.diagonal)


def _places(index: np.ndarray) -> _Places:
    return _Places(index, np.cumsum(np.diff(index, prepend=index[:1] - 1) != 1))


def _power_of_two(sizes: np.ndarray) -> np.ndarray:
    """The power of two next above each size; 1 for zero and for what is not finite."""
    _, exponents = np.frexp(np.where(np.isfinite(sizes) & (sizes > 0), sizes, 0.5))
    return np.ldexp(np.ones(len(sizes)), exponents)
