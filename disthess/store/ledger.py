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
from disthess.store.zarrays import create_plain, write_entries

MISSING = 0
DONE = 1
QUARANTINED = 2

_MEASURED = ("checksum", "seconds", "written_bytes", "peak_bytes", "worker")
"""Columns that are written before ``state``, as a record names them."""


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
        said = self._attributes()
        self._set(index, {field: [getattr(row, field) for row in rows] for field in _MEASURED})
        self._note_splits(last, said)
        self._set(index, {"state": [DONE] * len(rows)})
        self._forget({str(tile) for tile in last}, said)

    def quarantine(self, tile: int, message: str) -> None:
        """Mark a tile that keeps failing; it counts as missing, and its message is kept until it is done."""
        self._update({"quarantined": {**self.messages(), str(tile): message}})
        self._set(np.array([tile]), {"state": [QUARANTINED]})

    def clear(self, tiles: Sequence[int]) -> None:
        """Mark tiles missing."""
        if tiles:
            self._set(np.array(sorted(tiles)), {"state": [MISSING] * len(tiles)})
            self._forget({str(tile) for tile in tiles}, self._attributes())

    def messages(self) -> dict[str, str]:
        """Messages of quarantined tiles, by tile number as a string."""
        return dict(self._attributes().get("quarantined", {}))

    def splits(self) -> dict[int, int]:
        """How often each tile was halved that was computed in smaller pieces; others are not named."""
        return _splits(self._attributes())

    def is_reduced(self) -> bool:
        """Whether the panels of shared parameters have been summed from those of their uses."""
        return bool(self._attributes().get("reduced", False))

    def set_reduced(self, reduced: bool) -> None:
        """Say whether they have."""
        self._update({"reduced": reduced})

    def _note_splits(self, records: Mapping[int, TileRecord], said: Mapping[str, Any]) -> None:
        old = _splits(said)
        kept = {tile: times for tile, times in old.items() if tile not in records}
        new = {**kept, **{tile: record.split for tile, record in records.items() if record.split}}
        if new != old:
            self._update({"split": {str(tile): times for tile, times in sorted(new.items())}})

    def _forget(self, tiles: set[str], said: Mapping[str, Any]) -> None:
        old: dict[str, str] = said.get("quarantined", {})
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
        self._group().update_attributes(attributes)

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

    def _set(self, index: np.ndarray, columns: Mapping[str, Sequence[int | float]]) -> None:
        """Write rows of some columns, side by side: what a write takes is mostly waiting."""
        writes = []
        for field, values in columns.items():
            array = self._array(field)
            writes.append((array, index, np.asarray(values, dtype=array.dtype)))
        write_entries(writes)


def _splits(said: Mapping[str, Any]) -> dict[int, int]:
    return {int(tile): int(times) for tile, times in said.get("split", {}).items()}


def _is_tile(key: Any) -> bool:
    return isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 12


def attributes_trouble(value: dict[str, Any]) -> str:
    """What is wrong with the attributes of the ledger's group; empty where nothing is."""
    messages, splits = value.get("quarantined", {}), value.get("split", {})
    if not isinstance(value.get("reduced"), bool):
        return "reduced is neither true nor false"
    if not isinstance(messages, dict) or not all(
        _is_tile(tile) and isinstance(text, str) for tile, text in messages.items()
    ):
        return "quarantined does not map tiles to messages"
    if not isinstance(splits, dict) or not all(
        _is_tile(tile) and isinstance(times, int) and 0 <= times < 64 for tile, times in splits.items()
    ):
        return "split does not map tiles to how often they were halved"
    return ""
