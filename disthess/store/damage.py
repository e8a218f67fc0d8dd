"""Finding the chunk that cannot be read, and saying which tile it belongs to."""

from __future__ import annotations

from typing import Any

from disthess.store.layout import Layout, PanelSpec
from disthess.store.place import AbstractPlace
from disthess.store.zarrays import chunk_spans
from disthess.types import Part, Span


def find_missing(place: AbstractPlace, array: Any, region: tuple[Span, Span]) -> tuple[int, int] | None:
    """The first chunk of a region that has no file; it would read as NaN."""
    for chunk in chunk_spans(region, array.chunks):
        if not place.has(f"{array.path}/{array.metadata.encode_chunk_key(chunk)}"):
            return chunk
    return None


def find_damaged(array: Any, region: tuple[Span, Span]) -> tuple[int, int]:
    """The first chunk of a region that cannot be read."""
    height, width = array.chunks
    chunks = chunk_spans(region, array.chunks)
    for row, column in chunks:
        try:
            array[row * height : (row + 1) * height, column * width : (column + 1) * width]
        except (ValueError, OSError):
            return row, column
    return chunks[0]


def describe_damage(layout: Layout, path: str, where: tuple[PanelSpec, Part], chunk: tuple[int, int], what: str) -> str:
    """One paragraph: which chunk, whose rows, which tile, what to do."""
    panel, part = where
    start = chunk[0] * panel.row_chunk
    key = (panel.kind, panel.index)
    writers = {source for source, keys in layout.outputs if key in keys}
    tiles = [t.index for t in layout.tiles if t.source in writers and t.span.start <= start < t.span.stop]
    whose = f"tile {tiles[0]}" if tiles else "summed from the panels of its uses"
    return (
        f"Chunk {panel.path(part)}/{chunk[0]}/{chunk[1]} of the store {path} (rows from {start} of {panel.source}, "
        f"{whose}) {what}. If it has been computed, run 'disthess verify {path} --repair' and then run again, which "
        f"computes what is missing."
    )
