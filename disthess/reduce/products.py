"""The share of one chunk of a symmetric matrix in a product with some vectors, summed piece by piece.

A chunk ``T`` (rows r, columns c) of the upper triangle stands for itself and its transpose: ``Y_r += T X_c`` and
``Y_c += T^T X_r``. Both are formed of a piece of ``T`` while it is in the processor's cache.

Precision. Inside a chunk sums are formed in the dtype of multiplication, in blocks of at most a few hundred terms, whose sums along
rows are added in float64; sums along columns are added in that dtype over the pieces of one chunk (at most some thousand terms).
Shares of chunks are added in float64, in the order of chunks. In float32 that moves ``H x`` by about
``5e-7 |H|_F |x| / sqrt(P)`` (``|H|_F / sqrt(P)`` is the root mean square eigenvalue), some ten times what rounding the entries to
float32 did. Eigenpairs of a float32 store are asked to 1e-6 of the largest eigenvalue, which is more. In float64 it is the ordinary
product.

Determinism. Blocks are so small that the linear algebra library multiplies each in the calling thread (OpenBLAS: up to 2^18
multiplications, 9216 with one vector). So many threads of ours multiply side by side, and the bits depend on the layout alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np

from disthess.reduce.chunks import Chunk

BLOCK_PRODUCTS = 1 << 18
"""Multiplications of one call of the linear algebra library, at most."""

VECTOR_PRODUCTS = 1 << 13
"""The same with one vector."""

GROUP = 32
"""Vectors multiplied at once; more are taken group by group while the piece is in the cache."""


@final
class ChunkShare:
    """What one chunk adds to ``H X``.

    Args:
        chunk: Which.
        vectors: The rows of X that belong to the chunk's columns, ``[columns, k]`` float64.
        own: Those that belong to its rows, ``[rows, k]`` float64.
        dtype: Of multiplication.
        piece_rows: Most rows of a piece.
    """

    def __init__(self, chunk: Chunk, vectors: np.ndarray, own: np.ndarray, dtype: np.dtype, piece_rows: int) -> None:
        self._chunk = chunk
        self._own = own
        self.rows = np.zeros(own.shape)
        """Share in the rows of the chunk, ``[rows, k]`` float64."""
        starts = range(0, own.shape[1], GROUP)
        self._groups = [slice(start, min(start + GROUP, own.shape[1])) for start in starts]
        self._shares = [_GroupShare(vectors[:, group], own[:, group], dtype, piece_rows) for group in self._groups]

    def add(self, start: int, piece: np.ndarray) -> None:
        """Add the rows of the chunk from ``start`` on, ``[rows, columns]`` in the dtype of multiplication."""
        stop = start + len(piece)
        for group, share in zip(self._groups, self._shares, strict=True):
            self.rows[start:stop, group] += share.add(start, piece)

    def add_diagonal(self, start: int, diagonal: np.ndarray) -> None:
        """Add entries of the matrix's diagonal, from row ``start`` of the chunk on."""
        stop = start + len(diagonal)
        self.rows[start:stop] += diagonal.astype(np.float64)[:, None] * self._own[start:stop]

    def columns(self) -> np.ndarray:
        """Share in the rows of ``H X`` that belong to the chunk's columns, ``[columns, k]``."""
        return np.concatenate([share.columns() for share in self._shares], axis=1)


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Some columns of a chunk in blocks of equal size, with what is needed of and made from each.

    Attributes:
        columns: Which columns.
        vectors: Their rows of X, ``[blocks, size, k]``.
        kept: Sums over pieces of the shares in these columns, ``[blocks, k, size]``.
        down: Room for one piece times ``vectors``, ``[blocks, rows, k]``.
        across: Room for one piece's share in these columns, ``[blocks, k, size]``.
    """

    columns: slice
    vectors: np.ndarray
    kept: np.ndarray
    down: np.ndarray
    across: np.ndarray

    def view(self, piece: np.ndarray) -> np.ndarray:
        """A piece, one block of columns after another, ``[blocks, rows, size]``; nothing is copied."""
        count, size, _ = self.vectors.shape
        return piece[:, self.columns].reshape(len(piece), count, size).transpose(1, 0, 2)


@final
class _GroupShare:
    """The same for a few vectors: columns in blocks, as many equal ones as there are and the rest."""

    def __init__(self, vectors: np.ndarray, own: np.ndarray, dtype: np.dtype, piece_rows: int) -> None:
        count, width = vectors.shape
        most = VECTOR_PRODUCTS if width == 1 else BLOCK_PRODUCTS
        size = min(count, max(1, most // (piece_rows * width)))
        whole = count // size * size
        self._own = np.ascontiguousarray(own.T, dtype=dtype)
        cast = np.ascontiguousarray(vectors, dtype=dtype)

        def blocks(start: int, stop: int, size: int) -> _Blocks:
            parts = cast[start:stop].reshape(-1, size, width)
            kept = np.zeros((len(parts), width, size), dtype=dtype)
            down = np.empty((len(parts), piece_rows, width), dtype=dtype)
            return _Blocks(slice(start, stop), parts, kept, down, np.empty_like(kept))

        self._blocks = [blocks(0, whole, size)]
        if whole < count:
            self._blocks.append(blocks(whole, count, count - whole))

    def add(self, start: int, piece: np.ndarray) -> np.ndarray:
        """``piece X_c``, ``[rows, k]`` float64; ``piece^T X_r`` is added to what is kept."""
        height = len(piece)
        own = self._own[:, start : start + height]
        total = np.zeros((height, len(own)))
        for blocks in self._blocks:
            values, down = blocks.view(piece), blocks.down[:, :height]
            np.matmul(values, blocks.vectors, out=down)
            total += down.sum(axis=0, dtype=np.float64)
            np.matmul(own, values, out=blocks.across)
            np.add(blocks.kept, blocks.across, out=blocks.kept)
        return total

    def columns(self) -> np.ndarray:
        parts = [blocks.kept.transpose(0, 2, 1).reshape(-1, len(self._own)) for blocks in self._blocks]
        return np.concatenate(parts)


def take_diagonal(chunk: Chunk, start: int, piece: np.ndarray) -> tuple[int, np.ndarray]:
    """Set to zero what lies on and below the matrix's diagonal in a piece, and return what was on it.

    An entry above the diagonal stands for two places, one on it for one; what is stored below is not used.

    Args:
        chunk: Whose piece.
        start: First row of the piece, counted from the chunk's first.
        piece: ``[rows, columns]``, changed in place.

    Returns:
        The first row, counted from the chunk's first, whose diagonal entry lies in the piece, and the entries from there on.
    """
    first_row, first_column = chunk.rows.start + start, chunk.columns.start
    width = min(chunk.rows.stop, chunk.columns.stop) - first_column
    if width <= 0 or first_column >= first_row + len(piece):
        return start, np.zeros(0, dtype=piece.dtype)
    square = piece[:, :width]
    begin = max(first_row, first_column)
    entries = square[begin - first_row :, begin - first_column :].diagonal().copy()
    # Of row i everything up to its diagonal, column ``below + i``.
    below = first_row + 1 - first_column
    for row in range(max(0, -below), len(square)):
        square[row, : below + row] = 0
    return begin - chunk.rows.start, entries
