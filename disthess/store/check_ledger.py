"""The ledger against itself, the layout and the data; and writing it again where it was lost.

A lost mark is found again from the data: a tile whose chunks are all there, each with its own crc32c, is done; where the
ledger still has the tile's checksum, the data must have that too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from disthess.store.found import Damage
from disthess.store.layout import Layout, TileRecord
from disthess.store.ledger import DONE, MISSING, QUARANTINED
from disthess.store.metadata import LEDGER_CHUNK, LEDGER_FIELDS, checked_array, ledger_arrays
from disthess.store.raw import Objects
from disthess.store.tile_data import TileData

if TYPE_CHECKING:
    from disthess.store.store import Store


@dataclass(frozen=True, slots=True)
class Rows:
    """What could be read of the ledger.

    Attributes:
        values: Each column, ``[tiles]``; 0 where it is lost.
        lost: Which rows of each column cannot be read, or are gone.
        reasons: (column, first tile, one past the last, what is wrong) of each lost chunk.
    """

    values: dict[str, np.ndarray]
    lost: dict[str, np.ndarray]
    reasons: tuple[tuple[str, int, int, str], ...]

    @property
    def state(self) -> np.ndarray:
        """The column of states."""
        return self.values["state"]

    @property
    def checksum(self) -> np.ndarray:
        """The column of checksums."""
        return self.values["checksum"]

    @property
    def is_lost(self) -> bool:
        """Whether anything cannot be read."""
        return bool(self.reasons)

    def damage(self, layout: Layout) -> list[Damage]:
        """One for each lost chunk."""
        return [
            Damage(-1, f"the ledger's {field} of tiles {start} to {stop - 1}", why, "ledger", f"ledger/{field}")
            for field, start, stop, why in self.reasons
        ]


def read_rows(store: Store) -> Rows:
    """Read the ledger chunk by chunk, so that one that is damaged does not hide the others."""
    tiles = len(store.layout.tiles)
    forms, objects = ledger_arrays(tiles), Objects(store.root)
    values = {name: np.zeros(tiles, np.dtype(dtype)) for name, dtype in LEDGER_FIELDS}
    lost = {name: np.zeros(tiles, bool) for name in values}
    reasons: list[tuple[str, int, int, str]] = []
    arrays: dict[str, Any] = {}
    for name in values:
        try:
            arrays[name] = checked_array(store.root, f"ledger/{name}", forms[f"ledger/{name}"])
        except (ValueError, OSError) as error:
            reasons.append((name, 0, tiles, f"cannot be read: of its zarr.json, {error}"))
            lost[name][:] = True
    for number, start in enumerate(range(0, tiles, LEDGER_CHUNK)):
        stop = min(start + LEDGER_CHUNK, tiles)
        there = {name: objects.exists(f"ledger/{name}/c/{number}") for name in values}
        for name, array in arrays.items():
            why = ""
            if not there[name] and any(there.values()):
                why = "is not there, and other columns are (lost, or a writer was killed at its first mark)"
            else:
                try:
                    values[name][start:stop] = array[start:stop]
                except (ValueError, OSError) as error:
                    why = f"cannot be read: {error}"
            if why:
                lost[name][start:stop] = True
                reasons.append((name, start, stop, why))
    return Rows(values, lost, tuple(reasons))


def rebuild(store: Store, rows: Rows, data: TileData) -> Rows:
    """Find lost rows again from the data, and write the ledger's columns that were damaged.

    Returns:
        Rows of which none is lost.
    """
    values = {name: column.copy() for name, column in rows.values.items()}
    for tile in store.layout.tiles:
        index = tile.index
        no_state, no_checksum = bool(rows.lost["state"][index]), bool(rows.lost["checksum"][index])
        if no_state or (no_checksum and values["state"][index] == DONE):
            message, checksum = ("", 0) if data.count_chunks(tile)[1] else ("its data is not all there", 0)
            if not message:
                message, checksum = data.read(tile)
            if no_checksum:
                values["checksum"][index] = checksum
            if no_state:
                # Data that is partly there, or damaged, stays marked done: it is then found as a damaged tile.
                some = data.count_chunks(tile)[0]
                known = no_checksum or int(values["checksum"][index]) == checksum
                values["state"][index] = DONE if (known and not message) or (some and message) else MISSING
        if rows.lost["written_bytes"][index] and values["state"][index] == DONE:
            values["written_bytes"][index] = data.nbytes(tile)
    _write(store, rows, values)
    return Rows(values, {name: np.zeros_like(mask) for name, mask in rows.lost.items()}, ())


def check_rows(store: Store, rows: Rows, data: TileData, *, repair: bool) -> tuple[list[Damage], int]:
    """Rows that cannot be true; with ``repair`` they are put right.

    Returns:
        The damage, and how many missing tiles have all their data without the ledger knowing it.
    """
    found, marks, unmarked = [], [], 0
    for number, trouble in _troubles(store, rows, data):
        found.append(Damage(number, data.place(store.layout.tiles[number]), trouble, "ledger", "ledger", mended=repair))
        if rows.state[number] == DONE:
            marks.append(_true_record(store, rows, data, number))
        elif repair and rows.state[number] != QUARANTINED:
            rows.state[number] = MISSING
            store.mark_missing([number])
    for tile in store.layout.tiles:
        index = tile.index
        if rows.state[index] != MISSING or rows.lost["state"][index] or not data.count_chunks(tile)[1]:
            continue
        if (
            not rows.checksum[index]
            or rows.lost["checksum"][index]
            or data.read(tile) != ("", int(rows.checksum[index]))
        ):
            unmarked += 1
            continue
        said = "the ledger calls it missing, and its data is there with the checksum that the ledger has"
        found.append(Damage(index, data.place(tile), said, "ledger", "ledger", mended=repair))
        marks.append(_true_record(store, rows, data, index))
        if repair:
            rows.state[index] = DONE
    if repair:
        store.mark(marks)
    return found, unmarked


def _troubles(store: Store, rows: Rows, data: TileData) -> Iterator[tuple[int, str]]:
    """(tile, what cannot be true) of rows that can be read."""
    for tile in store.layout.tiles:
        index = tile.index
        row = {name: column[index] for name, column in rows.values.items() if not rows.lost[name][index]}
        state = int(row.get("state", MISSING))
        if state not in (MISSING, DONE, QUARANTINED):
            yield index, f"the ledger's state of it is {state}, which is none"
        elif state == DONE and int(row.get("written_bytes", data.nbytes(tile))) != data.nbytes(tile):
            yield (
                index,
                f"the ledger says {int(row['written_bytes']):,} bytes written, and it has {data.nbytes(tile):,}",
            )
        elif state == DONE and not (
            0 <= float(row.get("seconds", 0)) < np.inf and row.get("peak_bytes", 0) >= 0 and row.get("worker", 0) >= 0
        ):
            yield index, "the ledger's seconds, peak bytes or worker of it are no such numbers"


def _true_record(store: Store, rows: Rows, data: TileData, tile: int) -> TileRecord:
    seconds = float(rows.values["seconds"][tile])
    return TileRecord(
        tile,
        int(rows.checksum[tile]),
        seconds if 0 <= seconds < np.inf else 0.0,
        data.nbytes(store.layout.tiles[tile]),
        max(0, int(rows.values["peak_bytes"][tile])),
        max(0, int(rows.values["worker"][tile])),
    )


def _write(store: Store, rows: Rows, values: dict[str, np.ndarray]) -> None:
    objects, forms = Objects(store.root), ledger_arrays(len(store.layout.tiles))
    for name, start, stop, _ in rows.reasons:
        # Else the damaged chunk would be read before it is written.
        for number in range(start // LEDGER_CHUNK, -(-stop // LEDGER_CHUNK)):
            objects.delete(f"ledger/{name}/c/{number}")
        array = checked_array(store.root, f"ledger/{name}", forms[f"ledger/{name}"])
        array[start:stop] = values[name][start:stop]
