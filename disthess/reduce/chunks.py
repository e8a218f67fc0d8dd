"""Chunk files of a store read piece by piece into memory that is used again, each checked by its crc32c.

A chunk is read once, straight from its file (schema 1: uncompressed, little-endian, C order, crc32c after the data). A piece is a
few rows: it is checksummed and multiplied while it is in the processor's cache. What was done with the pieces of a chunk must be
thrown away if its checksum, known only after the last of them, is wrong: ``ChunkFiles.pieces`` raises then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass
from typing import BinaryIO, NoReturn, final

import google_crc32c
import numpy as np

from disthess.errors import StoreError
from disthess.reduce.arrays import PanelReader
from disthess.store.layout import PanelSpec
from disthess.types import Part, Span

PIECE_ROWS = 128
"""Rows of a piece where rows are long, about."""

PIECE_BYTES = 512 << 10
"""Short rows are read together up to this,"""

MOST_ROWS = 2048
"""and up to so many."""

ALIGNMENT = 4096
"""Of buffers. Not for form's sake: some processors (AMD Zen 3) copy out of the page cache six times slower to addresses that lie up
to 16 bytes after a page's start, which is where large numpy arrays lie."""

_CRC_BYTES = 4


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk of a panel, as far as products need it.

    Attributes:
        panel: Which panel.
        place: Number of the chunk: row, column.
        rows: Rows of the panel.
        columns: Columns of the panel that are needed, from the first row of the chunk on: what lies left of it is in other chunks.
    """

    panel: PanelSpec
    place: tuple[int, int]
    rows: Span
    columns: Span

    @property
    def skipped(self) -> int:
        """Columns of the file that are left of those needed."""
        return self.columns.start - self.place[1] * self.panel.column_chunk

    @property
    def entries(self) -> int:
        """Entries needed."""
        return self.rows.size * self.columns.size

    def file_bytes(self, itemsize: int) -> int:
        """Bytes of its file: chunks at the edges are stored at full size."""
        return self.panel.row_chunk * self.panel.column_chunk * itemsize + _CRC_BYTES

    def piece_rows(self, itemsize: int) -> int:
        """Rows per piece; depends on the layout alone, and so do the sums made of pieces."""
        rows = self.panel.row_chunk
        wanted = max(PIECE_ROWS, min(MOST_ROWS, PIECE_BYTES // (self.panel.column_chunk * itemsize)))
        # Even pieces: a thin last one would be multiplied slowly.
        return -(-rows // max(1, round(rows / wanted)))


def needed_chunks(reader: PanelReader) -> tuple[Chunk, ...]:
    """All chunks that hold something on or above the diagonal, in the order of panels, rows, columns.

    Raises:
        StoreError: Tiles are missing.
    """
    found = []
    for band in reader.bands():
        panel, width = band.panel, band.panel.column_chunk
        for column in range(band.rows.start // width, -(-panel.columns // width)):
            columns = Span(max(column * width, band.rows.start), min((column + 1) * width, panel.columns))
            found.append(Chunk(panel, (band.rows.start // panel.row_chunk, column), band.rows, columns))
    return tuple(found)


def aligned(shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    """Memory for a piece, starting at a page."""
    size = shape[0] * shape[1] * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


@final
class ChunkFiles:
    """Reads the chunk files of a part of a store. Reading is safe from several threads, each with buffers of its own.

    Args:
        reader: The store and part; ``residual`` is the difference of two files where only hessian and ggn are stored.
    """

    def __init__(self, reader: PanelReader) -> None:
        self._reader = reader
        self._dtype = np.dtype(reader.store.layout.dtype).newbyteorder("<")

    def buffers(self, chunks: tuple[Chunk, ...]) -> list[np.ndarray]:
        """Memory for the largest piece of some chunks, for each of the parts that are read: one, or two for a difference."""
        rows = max(
            (c.piece_rows(self._dtype.itemsize) * c.panel.column_chunk for c in chunks),
            default=1,
        )
        return [aligned((1, rows), self._dtype) for _ in self._reader.read_parts]

    def pieces(self, chunk: Chunk, buffers: list[np.ndarray]) -> Generator[tuple[int, np.ndarray], None, None]:
        """Rows of a chunk from the first on, as ``(row of the chunk, [rows, columns.size])`` in the store's dtype.

        A piece may be written to; it lies in a buffer and is gone when the next is asked for.

        Raises:
            StoreError: The file is not there, has another length, or its bytes are not those of its checksum; after the last piece
                at the latest.
        """
        sources = [
            self._file(chunk, part, buffer) for part, buffer in zip(self._reader.read_parts, buffers, strict=True)
        ]
        with contextlib.ExitStack() as stack:
            for source in sources:
                stack.callback(source.close)
            start = 0
            for values, *others in zip(*sources, strict=True):
                for other in others:
                    values -= other
                rows = min(len(values), chunk.rows.size - start)
                if rows > 0:
                    yield start, values[:rows, chunk.skipped : chunk.skipped + chunk.columns.size]
                start += len(values)

    def _file(self, chunk: Chunk, part: Part, buffer: np.ndarray) -> Generator[np.ndarray, None, None]:
        """All rows of a chunk's file, padding and all, piece by piece."""
        panel, step = chunk.panel, chunk.piece_rows(self._dtype.itemsize)
        key = self._reader.store.array(panel, part).metadata.encode_chunk_key(chunk.place)
        whole, checksum = buffer.reshape(-1), 0
        try:
            file, size = self._reader.store.place.open(f"{panel.path(part)}/{key}")
        except OSError:
            self._damaged(chunk)
        with file:
            if size != chunk.file_bytes(self._dtype.itemsize):
                self._damaged(chunk)
            for start in range(0, panel.row_chunk, step):
                rows = min(step, panel.row_chunk - start)
                values = whole[: rows * panel.column_chunk]
                self._fill(file, values.view(np.uint8), chunk)
                checksum = google_crc32c.extend(checksum, values.view(np.uint8))
                yield values.reshape(rows, panel.column_chunk)
            kept = np.empty(_CRC_BYTES, dtype=np.uint8)
            self._fill(file, kept, chunk)
            if int(kept.view("<u4")[0]) != checksum:
                self._damaged(chunk)

    def _fill(self, file: BinaryIO, target: np.ndarray, chunk: Chunk) -> None:
        view = target.data
        while len(view):
            try:
                count = file.readinto(view)  # type: ignore[attr-defined]
            except OSError:
                count = 0
            if not count:
                self._damaged(chunk)
            view = view[count:]

    def _damaged(self, chunk: Chunk) -> NoReturn:
        """Say what is wrong with a chunk in the words of the store's own reader."""
        self._reader.read(chunk.panel, chunk.rows, chunk.columns)
        raise StoreError(
            f"Chunk {chunk.place[0]}/{chunk.place[1]} of the panel of {chunk.panel.source} in {self._reader.store.path} changed "
            f"while it was read. Wait until nothing writes the store, and ask again."
        )
