"""The stored data of a tile, read again: its checksum, and whether its chunks are there."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from disthess.errors import StoreError
from disthess.store.claims import panels_by_source, tile_nbytes
from disthess.store.layout import Tile
from disthess.store.raw import Objects
from disthess.store.zarrays import checksum_rows
from disthess.types import Span

if TYPE_CHECKING:
    from disthess.store.store import Store


@final
class TileData:
    """Reads tiles back.

    Args:
        store: The store.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._panels = panels_by_source(store.layout)
        self._objects = Objects(store.root)

    def place(self, tile: Tile) -> str:
        """Source and rows, for people."""
        return f"{tile.source}, rows {tile.span.start} to {tile.span.stop - 1}"

    def paths(self, tile: Tile) -> frozenset[str]:
        """Paths of the arrays that it lies in."""
        return frozenset(panel.path(part) for panel in self._panels[tile.source] for part in self._store.layout.parts)

    def nbytes(self, tile: Tile) -> int:
        """Bytes of its numbers."""
        return tile_nbytes(self._store.layout, self._panels[tile.source], tile.span.start, tile.span.size)

    def read(self, tile: Tile) -> tuple[str, int]:
        """What is wrong with its data (empty where it can be read), and its crc32c."""
        checksum = 0
        try:
            for part in self._store.layout.parts:
                for panel in self._panels[tile.source]:
                    columns = Span(panel.first_column(tile.span.start), panel.columns)
                    for start in range(tile.span.start, tile.span.stop, panel.row_chunk):
                        piece = Span(start, min(start + panel.row_chunk, tile.span.stop))
                        checksum = checksum_rows(checksum, self._store.read(panel, part, piece, columns))
        except StoreError as error:
            return str(error), 0
        return "", checksum

    def count_chunks(self, tile: Tile) -> tuple[bool, bool]:
        """Whether any of its chunks is there, and whether all are; stops as soon as both are known."""
        some, all_there = False, True
        for part in self._store.layout.parts:
            for panel in self._panels[tile.source]:
                first = panel.first_column(tile.span.start) // panel.column_chunk
                for row in range(tile.span.start // panel.row_chunk, -(-tile.span.stop // panel.row_chunk)):
                    for column in range(first, -(-panel.columns // panel.column_chunk)):
                        is_there = self._objects.exists(f"{panel.path(part)}/c/{row}/{column}")
                        some, all_there = some or is_there, all_there and is_there
                        if some and not all_there:
                            return True, False
                        if not some and row > tile.span.start // panel.row_chunk:
                            return False, False
        return some, all_there


def first_line(error: Exception) -> str:
    """The text of an error, on one line."""
    return " ".join(str(error).split())[:400]
