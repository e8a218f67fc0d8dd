"""Whether a layout contradicts itself: names against sizes, panels against parameters, tiles against panels.

In time linear in the layout, whatever sizes it claims.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from disthess.store.layout import Layout, PanelSpec
from disthess.types import ITEM_BYTES

MOST_ROW_CHUNKS = 2**22
"""Row chunks of all panels together."""

MOST_COLUMN_CHUNKS = 2**20
"""Chunks beside one another in one panel."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Largest numbers of entries.

    Attributes:
        entries: Of all parameters, and of rows or columns of a panel.
        chunk: Of a chunk.
    """

    entries: int
    chunk: int


def check_claims(layout: Layout, most_entries: int, most_chunk: int) -> None:
    """Check a layout whose fields have the right types.

    Args:
        layout: The layout.
        most_entries: Largest number of entries of all parameters, and of rows or columns of a panel.
        most_chunk: Largest number of entries of a chunk.

    Raises:
        ValueError: It contradicts itself, or claims more than any machine holds; the message says where.
    """
    _check_names(layout, most_entries)
    sizes = _sizes(layout)
    row_chunks = 0
    for panel in layout.panels:
        _check_panel(panel, sizes, Bounds(most_entries, most_chunk), layout.activation_samples)
        row_chunks += -(-panel.rows // panel.row_chunk)
    if row_chunks > MOST_ROW_CHUNKS:
        raise ValueError(f"its panels have {row_chunks:,} row chunks, more than {MOST_ROW_CHUNKS:,}")
    _check_tiles(layout, _check_outputs(layout))


def tile_nbytes(layout: Layout, panels: Iterable[PanelSpec], start: int, rows: int) -> int:
    """Bytes of the arrays of one tile, all parts."""
    columns = sum(panel.columns - panel.first_column(start) for panel in panels)
    return rows * columns * ITEM_BYTES[layout.dtype] * len(layout.parts)


def panels_by_source(layout: Layout) -> dict[str, tuple[PanelSpec, ...]]:
    """The panels that the tiles of each source write."""
    by_key = {(panel.kind, panel.index): panel for panel in layout.panels}
    return {source: tuple(by_key[key] for key in keys) for source, keys in layout.outputs}


def _check_names(layout: Layout, most_entries: int) -> None:
    for what, names in (
        ("parameters", [parameter.name for parameter in layout.parameters]),
        ("uses", [use for parameter in layout.parameters for use in parameter.uses]),
        ("activations", [entry.name for entry in layout.activations]),
        ("outputs", [source for source, _ in layout.outputs]),
        ("panels", [f"{panel.kind}/{panel.index}" for panel in layout.panels]),
    ):
        if len(set(names)) != len(names):
            twice = Counter(names).most_common(1)[0][0]
            raise ValueError(f"two of its {what} are called {twice[:60]!r}")
    if sorted(parameter.rank for parameter in layout.parameters) != list(range(len(layout.parameters))):
        raise ValueError("the ranks of its parameters are not 0, 1, 2, ... in some order")
    for what, total in (
        ("parameters", layout.numel),
        ("activations", sum(entry.numel for entry in layout.activations) * max(1, layout.activation_samples)),
    ):
        if total > most_entries:
            raise ValueError(f"its {what} have {total:,} entries, more than {most_entries:,}")


def _sizes(layout: Layout) -> dict[str, dict[str, int]]:
    return {
        "panels": {parameter.name: parameter.numel for parameter in layout.parameters if parameter.uses},
        "uses": {use: parameter.numel for parameter in layout.parameters for use in parameter.uses},
        "activations": {entry.name: entry.numel for entry in layout.activations},
    }


def _check_panel(panel: PanelSpec, sizes: Mapping[str, Mapping[str, int]], bounds: Bounds, samples: int) -> None:
    where = f"the panel {panel.kind}/{panel.index}"
    known = sizes[panel.kind]
    for name, size in ((panel.source, None), *panel.targets):
        if name not in known or size not in (None, known[name]):
            said = "" if size is None else f" with {size:,} entries"
            raise ValueError(f"{where} names {name[:60]!r}{said}, which the layout does not have")
    if len({name for name, _ in panel.targets}) != len(panel.targets):
        raise ValueError(f"{where} has a target twice")
    rows = known[panel.source] * (max(1, samples) if panel.kind == "activations" else 1)
    if panel.rows != rows:
        raise ValueError(f"{where} has {panel.rows:,} rows, and {panel.source[:60]!r} has {rows:,}")
    if panel.columns > bounds.entries or panel.row_chunk * panel.column_chunk > bounds.chunk:
        raise ValueError(f"{where} has {panel.columns:,} columns in chunks of {panel.row_chunk} x {panel.column_chunk}")
    if panel.columns > panel.column_chunk * MOST_COLUMN_CHUNKS:
        raise ValueError(f"{where} has more than {MOST_COLUMN_CHUNKS:,} chunks beside one another")
    if panel.diagonal and (not panel.targets or panel.targets[0] != (panel.source, panel.rows)):
        raise ValueError(f"{where} is called diagonal, and its first target is not its source")
    if panel.reduced and panel.kind != "panels":
        raise ValueError(f"{where} is called reduced, which only panels of parameters can be")


def _check_outputs(layout: Layout) -> dict[str, tuple[PanelSpec, ...]]:
    by_key = {(panel.kind, panel.index): panel for panel in layout.panels}
    seen = set()
    for source, keys in layout.outputs:
        for key in keys:
            panel = by_key.get(key)
            if panel is None or panel.reduced or key in seen:
                raise ValueError(f"the tiles of {source[:60]!r} write {key[0]}/{key[1]}, which is not theirs to write")
            seen.add(key)
    left = [key for key, panel in by_key.items() if not panel.reduced and key not in seen]
    if left:
        raise ValueError(f"no tile writes the panel {left[0][0]}/{left[0][1]}")
    return panels_by_source(layout)


def _check_tiles(layout: Layout, panels: Mapping[str, tuple[PanelSpec, ...]]) -> None:
    spans: dict[str, list[tuple[int, int]]] = {source: [] for source in panels}
    for tile in layout.tiles:
        if tile.source not in spans:
            raise ValueError(f"tile {tile.index} is of {tile.source[:60]!r}, which writes nothing")
        spans[tile.source].append((tile.span.start, tile.span.stop))
    for source, found in spans.items():
        found.sort()
        for panel in panels[source]:
            end = 0
            for start, stop in found:
                whole = start % panel.row_chunk == 0 and (stop % panel.row_chunk == 0 or stop == panel.rows)
                if start != end or stop <= start or not whole:
                    raise ValueError(
                        f"the tiles of {source[:60]!r} are not whole chunks of {panel.kind}/{panel.index}, in order"
                    )
                end = stop
            if end != panel.rows:
                raise ValueError(f"the tiles of {source[:60]!r} cover {end:,} of {panel.rows:,} rows")
