"""What reading a whole store again says about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from disthess.errors import StoreError
from disthess.store.layout import PanelSpec, Tile
from disthess.store.zarrays import checksum_rows
from disthess.types import Part, Span

if TYPE_CHECKING:
    from disthess.store.store import Store


@dataclass(frozen=True, slots=True)
class Damage:
    """A tile or a summed panel that does not read as it was written.

    Attributes:
        tile: Number of the tile; -1 where rows of a reduced panel are damaged.
        place: Source and rows, for people.
        message: What is wrong.
    """

    tile: int
    place: str
    message: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Outcome of ``Store.verify``.

    Attributes:
        checked: Tiles read again and compared with the ledger.
        missing: Tiles that are not done (nothing is known of them; that is no damage).
        damaged: What does not read as it was written.
        repaired: Whether damaged tiles were marked missing, so that running again computes them.
        checked_bytes: Bytes read.
    """

    checked: int
    missing: int
    damaged: tuple[Damage, ...]
    repaired: bool
    checked_bytes: int

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damaged


def verify_store(store: Store, repair: bool, progress: Callable[[int, int], None] | None) -> VerifyReport:
    """See ``Store.verify``."""
    records = store.records()
    damaged: list[Damage] = []
    read_bytes = 0
    for count, record in enumerate(records, start=1):
        tile = store.layout.tiles[record.tile]
        read_bytes += record.written_bytes
        message = _tile_damage(store, tile, record.checksum)
        if message:
            place = tile.place
            damaged.append(Damage(tile.index, place, message))
        if progress is not None:
            progress(count, len(records))
    summed = _reduced_damage(store)
    if repair:
        store.mark_missing([entry.tile for entry in damaged])
        if damaged or summed:
            store.mark_reduced(False)
            for name in store.result_names():
                if name.split("/")[0] == "certificate":
                    store.remove_result(name)
        store.remove_leftovers()
    return VerifyReport(
        checked=len(records),
        missing=len(store.layout.tiles) - len(records),
        damaged=(*damaged, *summed),
        repaired=repair and bool(damaged or summed),
        checked_bytes=read_bytes,
    )


def _tile_damage(store: Store, tile: Tile, expected: int) -> str:
    checksum = 0
    try:
        for part in store.layout.parts:
            for panel in store.layout.panels_of(tile.source):
                checksum = _checksum(store, panel, part, tile.span, checksum)
    except StoreError as error:
        return str(error)
    if checksum != expected:
        return f"its crc32c is {checksum:#010x}, the ledger says {expected:#010x}"
    return ""


def _checksum(store: Store, panel: PanelSpec, part: Part, rows: Span, checksum: int) -> int:
    columns = Span(panel.first_column(rows.start), panel.columns)
    for start in range(rows.start, rows.stop, panel.row_chunk):
        piece = Span(start, min(start + panel.row_chunk, rows.stop))
        checksum = checksum_rows(checksum, store.read(panel, part, piece, columns))
    return checksum


def _reduced_damage(store: Store) -> list[Damage]:
    """Chunks of summed panels have no checksum in the ledger, only their own."""
    found = []
    for panel in store.layout.panels:
        if not (panel.reduced and store.is_reduced()):
            continue
        for part in store.layout.parts:
            for start in range(0, panel.rows, panel.row_chunk):
                rows = Span(start, min(start + panel.row_chunk, panel.rows))
                try:
                    store.read(panel, part, rows, Span(panel.first_column(start), panel.columns))
                except StoreError as error:
                    place = f"{panel.source}, rows {rows.start} to {rows.stop - 1}"
                    found.append(Damage(-1, place, str(error)))
    return found
