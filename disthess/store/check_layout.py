"""What must hold of a layout before arrays are created: no two tiles meet in a chunk, and none is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from disthess.store.layout import Layout, PanelSpec, Tile
from disthess.types import Part


def check_layout(layout: Layout) -> None:
    """Check that tiles are numbered in order, partition the rows of their panels, and are whole row chunks of them.

    Two writers in one chunk lose data without an error, so this is the ground of parallel writing.

    Raises:
        ValueError: It does not hold; a mistake of whoever planned, not of the user.
    """
    rows_of: dict[str, list[tuple[int, int]]] = {}
    for position, tile in enumerate(layout.tiles):
        if tile.index != position:
            raise ValueError(f"tile {position} of a layout is numbered {tile.index}")
        rows_of.setdefault(tile.source, []).append((tile.span.start, tile.span.stop))
    seen: set[tuple[str, int]] = set()
    for source, keys in layout.outputs:
        spans = sorted(rows_of.get(source, []))
        for panel in layout.panels_of(source):
            _check_spans(source, spans, panel.rows, panel.row_chunk)
        for kind, index in keys:
            if (kind, index) in seen or layout.panel(kind, index).reduced:
                raise ValueError(f"the panel {kind}/{index} has two writers")
            seen.add((kind, index))
    lost = [
        panel.path(layout.parts[0]) for panel in layout.panels if _is_lost(panel.kind, panel.index, panel.reduced, seen)
    ]
    if lost:
        raise ValueError(f"no tile writes the panels {', '.join(lost)}")


def _is_lost(kind: str, index: int, reduced: bool, seen: set[tuple[str, int]]) -> bool:
    return not reduced and (kind, index) not in seen


def _check_spans(source: str, spans: list[tuple[int, int]], rows: int, row_chunk: int) -> None:
    end = 0
    for start, stop in spans:
        if start != end or start % row_chunk or (stop % row_chunk and stop != rows) or stop <= start:
            raise ValueError(
                f"the tiles of {source} do not partition its {rows} rows by whole chunks of {row_chunk}: {spans}"
            )
        end = stop
    if end != rows:
        raise ValueError(f"the tiles of {source} cover {end} of {rows} rows")


def check_tile(
    layout: Layout, tile: Tile, panels: Sequence[PanelSpec], arrays: Mapping[Part, Sequence[np.ndarray]]
) -> None:
    """Refuse arrays that are not those of a tile.

    Args:
        layout: Of the store.
        tile: What they are written as.
        panels: Of its source.
        arrays: For each part one array per panel.

    Raises:
        ValueError: Parts, shapes or dtype are not those of the layout.
    """
    if set(arrays) != set(layout.parts):
        raise ValueError(f"tile {tile.index} needs the parts {layout.parts}, got {tuple(arrays)}")
    if tile.span != layout.tiles[tile.index].span or tile.source != layout.tiles[tile.index].source:
        raise ValueError(f"tile {tile.index} of {tile.source} is not one of this store")
    wanted = [(tile.span.size, panel.columns - panel.first_column(tile.span.start)) for panel in panels]
    for part, values in arrays.items():
        shapes = [array.shape for array in values]
        dtypes = {str(array.dtype) for array in values} - {layout.dtype}
        if shapes != wanted or dtypes:
            raise ValueError(
                f"tile {tile.index} of {tile.source}, {part}: needs {layout.dtype} arrays of shapes {wanted}, "
                f"got {shapes} of {', '.join(sorted(dtypes)) or layout.dtype}"
            )
