"""The ledger: one row per tile, written by the driver alone, after the tile's data.

Six arrays of length ``tiles``. ``state`` is written last, so a row that says *done* is whole whenever the process dies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
import zarr

from disthess.errors import StoreError
from disthess.store.layout import TileRecord
from disthess.store.metadata import checked_array, group_trouble, ledger_arrays
from disthess.store.raw import Objects
from disthess.store.seal import identity_of, sealed
from disthess.store.zarrays import create_plain

MISSING = 0
DONE = 1
QUARANTINED = 2


def create_ledger(root: zarr.Group, tiles: int) -> None:
    """Create the ledger's arrays inside the root group; every tile is missing, and nothing is reduced."""
    fresh = {"quarantined": {}, "reduced": False, "split": {}, "identity": identity_of(root.attrs.asdict())}
    root.create_group("ledger", attributes=sealed(fresh))
    for path, form in ledger_arrays(tiles).items():
        create_plain(root, path, form.shape, np.dtype(form.dtype), form.chunks, form.fill)


@final
class Ledger:
    """Which tiles are done, with checksums and costs; read from the disk each time, since workers and driver share it.

    Args:
        root: The store's group.
        tiles: Number of tiles in its layout.
    """

    def __init__(self, root: zarr.Group, tiles: int) -> None:
        self._root = root
        self._forms = ledger_arrays(tiles)
        self._arrays: dict[str, Any] = {}

    def read(self, field: str) -> np.ndarray:
        """One column, ``[tiles]``, as it is on disk now.

        Raises:
            StoreError: It cannot be read.
        """
        try:
            return np.asarray(self._array(field)[:])
        except (ValueError, OSError) as error:
            raise self._damage(f"the column {field}", error) from error

    def mark(self, records: Sequence[TileRecord]) -> None:
        """Mark tiles done; their data must have been written before."""
        if not records:
            return
        last = {record.tile: record for record in records}
        index = np.array(sorted(last), dtype=np.int64)
        rows = [last[tile] for tile in index.tolist()]
        self._set("checksum", index, [record.checksum for record in rows])
        self._set("seconds", index, [record.seconds for record in rows])
        self._set("written_bytes", index, [record.written_bytes for record in rows])
        self._set("peak_bytes", index, [record.peak_bytes for record in rows])
        self._set("worker", index, [record.worker for record in rows])
        self._note_splits(last)
        self._set("state", index, [DONE] * len(rows))
        self._forget({str(tile) for tile in last})

    def quarantine(self, tile: int, message: str) -> None:
        """Mark a tile that keeps failing; it counts as missing, and its message is kept until it is done."""
        self._update({"quarantined": {**self.messages(), str(tile): message}})
        self._set("state", np.array([tile]), [QUARANTINED])

    def clear(self, tiles: Sequence[int]) -> None:
        """Mark tiles missing."""
        if tiles:
            self._set("state", np.array(sorted(tiles)), [MISSING] * len(tiles))
            self._forget({str(tile) for tile in tiles})

    def messages(self) -> dict[str, str]:
        """Messages of quarantined tiles, by tile number as a string."""
        return dict(self._attributes().get("quarantined", {}))

    def splits(self) -> dict[int, int]:
        """How often each tile was halved that was computed in smaller pieces; others are not named."""
        return {int(tile): int(times) for tile, times in self._attributes().get("split", {}).items()}

    def is_reduced(self) -> bool:
        """Whether the panels of shared parameters have been summed from those of their uses."""
        return bool(self._attributes().get("reduced", False))

    def set_reduced(self, reduced: bool) -> None:
        """Say whether they have."""
        self._update({"reduced": reduced})

    def _note_splits(self, records: Mapping[int, TileRecord]) -> None:
        old = self.splits()
        kept = {tile: times for tile, times in old.items() if tile not in records}
        new = {**kept, **{tile: record.split for tile, record in records.items() if record.split}}
        if new != old:
            self._update({"split": {str(tile): times for tile, times in sorted(new.items())}})

    def _forget(self, tiles: set[str]) -> None:
        old = self.messages()
        kept = {tile: message for tile, message in old.items() if tile not in tiles}
        if kept != old:
            self._update({"quarantined": kept})

    def _group(self) -> zarr.Group:
        return zarr.open_group(
            self._root.store,
            path="ledger",
            mode="r" if self._root.read_only else "r+",
            zarr_format=3,
            use_consolidated=False,
        )

    def _attributes(self) -> dict[str, Any]:
        try:
            value = Objects(self._root).json("ledger/zarr.json")
            trouble = group_trouble(value) or attributes_trouble(value.get("attributes", {}))
            if trouble:
                raise ValueError(trouble)
        except (ValueError, OSError) as error:
            raise self._damage("what it says of the whole", error) from error
        return dict(value["attributes"])

    def _update(self, values: dict[str, Any]) -> None:
        attributes = sealed({**self._attributes(), **values})
        self._group().attrs.update(attributes)

    def _array(self, field: str) -> Any:
        if field not in self._arrays:
            path = f"ledger/{field}"
            self._arrays[field] = checked_array(self._root, path, self._forms[path])
        return self._arrays[field]

    def _damage(self, what: str, error: Exception) -> StoreError:
        path = str(self._root.store_path).removeprefix("file://")
        said = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        return StoreError(
            f"The ledger of the store {path} is damaged: {what} cannot be read ({said}). Run 'disthess verify {path} "
            f"--repair', which writes it again from the stored data."
        )

    def _set(self, field: str, index: np.ndarray, values: list[Any]) -> None:
        array = self._array(field)
        array.oindex[index] = np.asarray(values, dtype=array.dtype)


def attributes_trouble(value: dict[str, Any]) -> str:
    """What is wrong with the attributes of the ledger's group; empty where nothing is."""
    messages = value.get("quarantined", {})
    if not isinstance(value.get("reduced"), bool):
        return "reduced is neither true nor false"
    if not isinstance(messages, dict) or not all(
        isinstance(tile, str) and tile.isascii() and tile.isdecimal() and len(tile) < 12 and isinstance(text, str)
        for tile, text in messages.items()
    ):
        return "quarantined does not map tiles to messages"
    return ""
