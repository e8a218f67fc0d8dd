"""What reading a whole store again says about it, place by place, and mending what needs no problem.

1. The ``zarr.json`` of every array and group against the layout; attributes against their checksum.
2. The ledger: every column read again, and each row against what the layout makes certain.
3. Every done tile against the ledger's checksum.
4. Summed panels, gradient and loss, where the ledger says that they were written.
5. Results: all their chunks, and their settings against the checksum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from disthess.errors import StoreError
from disthess.store.check_ledger import check_rows, read_rows, rebuild
from disthess.store.check_metadata import check_metadata, mend_metadata
from disthess.store.check_results import check_results, remove_damaged
from disthess.store.found import Damage
from disthess.store.layout import PanelSpec
from disthess.store.ledger import DONE
from disthess.store.tile_data import TileData, first_line
from disthess.types import Part, Span

if TYPE_CHECKING:
    from disthess.store.store import Store

__all__ = ["Damage", "VerifyReport", "summed_rows", "verify_store"]


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Outcome of ``Store.verify``.

    Attributes:
        checked: Tiles read again and compared with the ledger.
        missing: Tiles that are not done (nothing is known of them; that is no damage).
        damaged: What does not read as it was written, or does not agree with the rest.
        repaired: Whether damage was found and mended as far as can be without the problem: metadata and ledger written again,
            damaged tiles marked missing, damaged results removed.
        checked_bytes: Bytes read.
        unmarked: Of the missing tiles, those whose data is all there (a writer was killed before it could mark them).
    """

    checked: int
    missing: int
    damaged: tuple[Damage, ...]
    repaired: bool
    checked_bytes: int
    unmarked: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damaged


def verify_store(store: Store, repair: bool, progress: Callable[[int, int], None] | None) -> VerifyReport:
    """See ``Store.verify``."""
    layout, data = store.layout, TileData(store)
    damaged = check_metadata(store)
    if repair:
        mend_metadata(store, damaged)
        damaged = [replace(entry, mended=entry.kind == "metadata") for entry in damaged]
    broken = frozenset(entry.where for entry in damaged if entry.kind == "metadata" and not entry.mended)
    rows = read_rows(store)
    damaged += rows.damage(layout)
    if repair and rows.is_lost:
        rows = rebuild(store, rows, data)
    lies, unmarked = check_rows(store, rows, data, repair=repair)
    damaged += lies
    marked = [tile for tile in layout.tiles if rows.state[tile.index] == DONE and not rows.lost["state"][tile.index]]
    tiles = [tile for tile in marked if not broken.intersection(data.paths(tile))]
    read_bytes = 0
    for count, tile in enumerate(tiles, start=1):
        message, checksum = data.read(tile)
        if not message and not rows.lost["checksum"][tile.index] and checksum != rows.checksum[tile.index]:
            message = f"its crc32c is {checksum:#010x}, the ledger says {int(rows.checksum[tile.index]):#010x}"
        if message:
            damaged.append(Damage(tile.index, data.place(tile), message))
        read_bytes += data.nbytes(tile)
        if progress is not None:
            progress(count, len(tiles))
    damaged += _after_tiles(store, missing=len(layout.tiles) - len(marked))
    damaged += check_results(store)
    if repair:
        _mend(store, damaged)
        store.remove_leftovers()
    return VerifyReport(
        checked=len(tiles),
        missing=len(layout.tiles) - len(marked),
        damaged=tuple(damaged),
        repaired=repair and bool(damaged),
        checked_bytes=read_bytes,
        unmarked=unmarked,
    )


def summed_rows(store: Store) -> Iterator[tuple[PanelSpec, Part, Span]]:
    """The row chunks of every panel that is a sum over uses."""
    for panel in store.layout.panels:
        if panel.reduced:
            for part in store.layout.parts:
                for start in range(0, panel.rows, panel.row_chunk):
                    yield panel, part, Span(start, min(start + panel.row_chunk, panel.rows))


def _after_tiles(store: Store, missing: int) -> list[Damage]:
    """Sums, gradient and loss: there and readable if the ledger says that all is done; they have no checksum in the ledger."""
    try:
        if not store.is_reduced():
            return _plain_damage(store, wanted=False)
    except StoreError:
        return []
    found = []
    if missing:
        found.append(
            Damage(
                -1, "the ledger", f"it says that all is done, and {missing} tiles are not", "ledger", "ledger/zarr.json"
            )
        )
    for panel, part, rows in summed_rows(store):
        try:
            store.read(panel, part, rows, Span(panel.first_column(rows.start), panel.columns))
        except StoreError as error:
            place = f"sums of {panel.source}, rows {rows.start} to {rows.stop - 1}, {part}"
            found.append(Damage(-1, place, str(error), "sum", panel.path(part)))
    return found + _plain_damage(store, wanted=True)


def _plain_damage(store: Store, wanted: bool) -> list[Damage]:
    found = []
    readers: dict[str, Callable[[], object]] = {"gradient": store.gradient, "loss": store.loss}
    for name, read in readers.items():
        try:
            read()
        except StoreError as error:
            if wanted or "is damaged" in str(error):
                found.append(Damage(-1, f"the {name}", first_line(error), "plain", name))
    return found


def _mend(store: Store, damaged: list[Damage]) -> None:
    store.mark_missing([entry.tile for entry in damaged if entry.kind == "tile"])
    undone = any(entry.kind in ("tile", "sum", "plain") or entry.where == "ledger/zarr.json" for entry in damaged)
    if undone and store.is_reduced():
        store.mark_reduced(False)
    # A certificate speaks of the numbers that were there.
    stale = {"certificate"} if any(entry.kind in ("tile", "sum") for entry in damaged) else set()
    remove_damaged(store, damaged, stale)
