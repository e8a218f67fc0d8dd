"""The store of one run: panels, ledger, gradient and results in one Zarr group on a file system or an object store.

Who writes what: the driver creates everything, marks the ledger and writes results; workers write panels, each tile its own
whole chunks, so that nobody waits for anybody. A tile is data first, ledger after; a store is made so that none is
ever half made (see ``place``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import numpy as np
import zarr

from disthess.errors import StoreError
from disthess.store import results
from disthess.store.check_layout import check_tile
from disthess.store.damage import describe_damage, find_damaged, find_missing
from disthess.store.encode import from_json, to_json
from disthess.store.hostile import trusted_layout
from disthess.store.layout import Attributes, Layout, PanelSpec, Tile, TileRecord
from disthess.store.ledger import DONE, Ledger
from disthess.store.lock import StoreLock
from disthess.store.make import RESERVED_ATTRIBUTES, make_store, open_store_group, writing
from disthess.store.metadata import arrays_of, checked_array, read_whole
from disthess.store.place import AbstractPlace, first_line, place_of
from disthess.store.seal import SEAL, sealed
from disthess.store.verify import VerifyReport, verify_store
from disthess.store.zarrays import checksum_rows
from disthess.types import Part, Span


@final
class Store:
    """An open store. ``Store.create`` and ``Store.open`` make one.

    Reading is safe from several threads and processes; ``write_tile`` from several processes for different tiles; all
    else that writes belongs to one driver, which holds a ``StoreLock``.
    """

    def __init__(self, place: AbstractPlace, root: zarr.Group, *, writable: bool) -> None:
        self._place = place
        self._lease: StoreLock | None = None
        self._root = root
        self._writable = writable
        attributes = root.attrs.asdict()
        self._layout = trusted_layout(attributes, self.path)
        panels = {(panel.kind, panel.index): panel for panel in self._layout.panels}
        self._outputs = {source: tuple(panels[key] for key in keys) for source, keys in self._layout.outputs}
        self._ledger = Ledger(root, len(self._layout.tiles))
        self._forms = arrays_of(self._layout)
        self._arrays: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without the lease, which is its process's own."""
        return {**self.__dict__, "_lease": None}

    @classmethod
    def create(
        cls, path: str | os.PathLike[str] | AbstractPlace, layout: Layout, attributes: Mapping[str, Any]
    ) -> Store:
        """Create a store whose tiles are all missing, and open it for writing.

        Raises:
            StoreError: Something is at ``path`` already, or it cannot be written there.
            ValueError: The layout contradicts itself.
        """
        place = make_store(path, layout, attributes)
        return cls(place, open_store_group(place, writable=True), writable=True)

    @classmethod
    def open(cls, path: str | os.PathLike[str] | AbstractPlace, writable: bool = False) -> Store:
        """Open what ``create`` made, at a path or the URL of an object store.

        Raises:
            StoreError: Nothing is there, it is no store, damaged, of a newer schema, or not writable.
        """
        place = place_of(path)
        return cls(place, open_store_group(place, writable=writable), writable=writable)

    @property
    def path(self) -> str:
        """Where it is: a path or a URL."""
        return self._place.name

    @property
    def place(self) -> AbstractPlace:
        """The same, as what it is read and written by."""
        return self._place

    def hold(self, lease: StoreLock | None) -> None:
        """Write only while the lease is ours, from now on; None: no longer ask it."""
        self._lease = lease

    @property
    def is_local(self) -> bool:
        """Whether it lies on a file system, where a small write costs next to nothing."""
        return self._place.is_local

    @property
    def layout(self) -> Layout:
        """What it holds; owners and memory bounds of tiles are 0."""
        return self._layout

    @property
    def root(self) -> zarr.Group:
        """The zarr group, for what checks and mends below the level of tiles."""
        return self._root

    @property
    def attributes(self) -> Attributes:
        """The group's attributes, without the layout: schema, dtype, fingerprint, config, versions ..."""
        return {
            key: from_json(value) for key, value in self._root.attrs.asdict().items() if key not in ("layout", SEAL)
        }

    def set_attributes(self, **values: Any) -> None:
        """Set attributes of the group (driver only).

        Raises:
            StoreError: One of them belongs to the schema, or the store is open for reading only.
        """
        self._check_writable()
        taken = RESERVED_ATTRIBUTES.intersection(values)
        if taken:
            raise StoreError(f"The attributes {', '.join(sorted(taken))} of a store cannot be changed.")
        with writing(self.path, "attributes", 0):
            self._root.update_attributes(sealed({**self._root.attrs.asdict(), **to_json(values)}))

    # -- panels

    def array(self, panel: PanelSpec, part: Part) -> Any:
        """The zarr array of a panel, ``[panel.rows, panel.columns]``; what no tile wrote reads NaN.

        Raises:
            StoreError: The store does not hold that part.
        """
        name = panel.path(part)
        if name not in self._arrays:
            if part not in self._layout.parts:
                raise StoreError(
                    f"The store {self.path} holds {', '.join(self._layout.parts)}, not {part!r}. Compute a store with "
                    f"that part, or ask for one of those."
                )
            try:
                self._arrays[name] = checked_array(self._root, name, self._forms[name])
            except (ValueError, OSError) as error:
                raise StoreError(
                    f"The array {name} of the store {self.path} cannot be used: of its zarr.json, {first_line(error)}. Run "
                    f"'disthess verify {self.path} --repair', which writes that file again."
                ) from error
        return self._arrays[name]

    def read(self, panel: PanelSpec, part: Part, rows: Span, columns: Span) -> np.ndarray:
        """A stored region of a panel, ``[rows.size, columns.size]``, checked by crc32c while it is read.

        Raises:
            StoreError: A chunk of it was never written, is gone, or is damaged.
            ValueError: The region is outside the panel.
        """
        if rows.stop > panel.rows or columns.stop > panel.columns:
            raise ValueError(
                f"{rows} x {columns} is outside the panel of {panel.source}, {panel.rows} x {panel.columns}"
            )
        array = self.array(panel, part)
        region = (rows, columns)
        lost = find_missing(self._place, array, region) if self._place.is_local else None
        if lost is None:
            values = self._values(panel, part, region)
            if not self._place.is_local and np.isnan(values).any():
                lost = find_missing(self._place, array, region)
        if lost is not None:
            raise StoreError(describe_damage(self._layout, self.path, (panel, part), lost, "is not there"))
        return values

    def _values(self, panel: PanelSpec, part: Part, region: tuple[Span, Span]) -> np.ndarray:
        array, (rows, columns) = self.array(panel, part), region
        try:
            return np.asarray(array[rows.start : rows.stop, columns.start : columns.stop])
        except (ValueError, OSError) as error:
            what = f"is damaged ({first_line(error)})"
            chunk = find_damaged(array, region)
            raise StoreError(describe_damage(self._layout, self.path, (panel, part), chunk, what)) from error

    def write_tile(self, tile: Tile, arrays: Mapping[Part, Sequence[np.ndarray]]) -> tuple[int, int]:
        """Write a tile's data, and leave the ledger alone.

        Args:
            tile: One of the layout's tiles.
            arrays: For each part one array per panel of ``layout.panels_of(tile.source)``, in that order, each
                ``[tile.span.size, panel.columns - panel.first_column(tile.span.start)]`` in the store's dtype.

        Returns:
            crc32c over the bytes of all arrays (part by part in the layout's order, panel by panel), and bytes written.

        Raises:
            StoreError: The disk is full or cannot be written.
            ValueError: Parts, shapes or dtype are not those of the layout.
        """
        self._check_writable()
        panels = self._outputs[tile.source]
        check_tile(self._layout, tile, panels, arrays)
        written = sum(array.nbytes for part in self._layout.parts for array in arrays[part])
        checksum = 0
        with writing(self.path, f"tile {tile.index}", written):
            for part in self._layout.parts:
                for panel, values in zip(panels, arrays[part], strict=True):
                    first = panel.first_column(tile.span.start)
                    if values.size:
                        self.array(panel, part)[tile.span.start : tile.span.stop, first:] = values
                    checksum = checksum_rows(checksum, values)
        return checksum, written

    def write_rows(self, panel: PanelSpec, part: Part, start: int, array: np.ndarray) -> None:
        """Write rows from ``start`` on, from column ``panel.first_column(start)`` on; whole row chunks (driver only).

        Raises:
            StoreError: The disk is full or cannot be written.
            ValueError: The rows are not whole chunks, or the shape or dtype is not the panel's.
        """
        self._check_writable()
        stop = start + array.shape[0]
        first = panel.first_column(start)
        if start % panel.row_chunk or (stop % panel.row_chunk and stop != panel.rows) or stop > panel.rows:
            raise ValueError(f"rows {start}:{stop} of {panel.source} are not whole chunks of {panel.row_chunk} rows")
        if array.shape[1:] != (panel.columns - first,) or array.dtype != self._layout.dtype:
            raise ValueError(
                f"rows {start}:{stop} of {panel.source} need {panel.columns - first} columns of {self._layout.dtype}, "
                f"got {array.shape} of {array.dtype}"
            )
        if array.size:
            with writing(self.path, f"rows {start}:{stop} of {panel.source}", array.nbytes):
                self.array(panel, part)[start:stop, first:] = array

    # -- ledger

    def done(self) -> np.ndarray:
        """Which tiles are done, bool ``[tiles]``, as the ledger says now."""
        return np.asarray(self._ledger.read("state") == DONE)

    def missing_tiles(self) -> tuple[int, ...]:
        """Numbers of the tiles that are not done, quarantined ones included."""
        return tuple(np.flatnonzero(~self.done()).tolist())

    def mark(self, records: Sequence[TileRecord]) -> None:
        """Mark tiles done whose data has been written (driver only).

        Raises:
            StoreError: The disk is full or cannot be written.
        """
        self._check_writable()
        with writing(self.path, "the ledger", 0):
            self._ledger.mark(records)

    def records(self) -> tuple[TileRecord, ...]:
        """What the ledger says of every tile that is done."""
        columns = [
            self._ledger.read(field).tolist()
            for field in ("checksum", "seconds", "written_bytes", "peak_bytes", "worker")
        ]
        splits = self._ledger.splits()
        return tuple(
            TileRecord(tile, checksum, seconds, written, peak, worker, splits.get(tile, 0))
            for tile, (done, checksum, seconds, written, peak, worker) in enumerate(zip(self.done().tolist(), *columns))
            if done
        )

    def quarantine(self, tile: int, message: str) -> None:
        """Keep a tile's error; it counts as missing, and running again tries it again (driver only)."""
        self._check_writable()
        with writing(self.path, "the ledger", 0):
            self._ledger.quarantine(tile, message)

    def quarantined(self) -> dict[int, str]:
        """Messages of the tiles that failed for good, by number."""
        return {
            int(tile): message
            for tile, message in sorted(self._ledger.messages().items(), key=lambda pair: int(pair[0]))
        }

    def mark_missing(self, tiles: Sequence[int]) -> None:
        """Mark tiles missing, so that running again computes them (driver only)."""
        self._check_writable()
        self._ledger.clear(tiles)

    def is_reduced(self) -> bool:
        """Whether what follows the tiles has been done: above all, the sums of the panels of shared parameters."""
        return self._ledger.is_reduced()

    def mark_reduced(self, reduced: bool = True) -> None:
        """Say that it has been (driver only)."""
        self._check_writable()
        self._ledger.set_reduced(reduced)

    def verify(self, repair: bool = False, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
        """Read every done tile again and compare it with the ledger's checksum.

        Args:
            repair: Mark damaged tiles missing, so that running again computes them, forget certificates if there are
                any, and remove leftovers of killed writers. Only while nobody else writes.
            progress: Called with (tiles read, tiles to read) after each.

        Raises:
            StoreError: ``repair`` on a store that is open for reading only.
        """
        if repair:
            self._check_writable()
        return verify_store(self, repair, progress)

    # -- gradient, loss, results

    def write_gradient(self, gradient: np.ndarray) -> None:
        """Write the gradient ``[P]`` in user order (driver only)."""
        self._write_plain("gradient", np.asarray(gradient, dtype=np.float64).reshape(self._layout.numel))

    def gradient(self) -> np.ndarray:
        """The gradient of the loss, float64 ``[P]`` in user order.

        Raises:
            StoreError: It has not been written.
        """
        return self._read_plain("gradient")

    def write_loss(self, loss: float) -> None:
        """Write the loss (driver only)."""
        self._write_plain("loss", np.asarray(loss, dtype=np.float64))

    def loss(self) -> float:
        """The loss.

        Raises:
            StoreError: It has not been written.
        """
        return float(self._read_plain("loss"))

    def has_result(self, name: str) -> bool:
        """Whether a result of that name is there."""
        return results.has_result(self._place, name)

    def write_result(self, name: str, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any]) -> None:
        """Write or replace a result as a whole; ``name`` is words with slashes between, such as ``spectrum/both-10``.

        Raises:
            StoreError: The name or an array is not allowed, or the disk is full.
        """
        self._check_writable()
        with writing(self.path, f"result {name}", sum(np.asarray(array).nbytes for array in arrays.values())):
            results.write_result(self._place, name, arrays, attributes)

    def read_result(self, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Arrays and attributes of a result.

        Raises:
            StoreError: There is none of that name, or it is damaged.
        """
        return results.read_result(self._place, name)

    def remove_result(self, name: str) -> None:
        """Remove a result, if it is there (driver only)."""
        self._check_writable()
        results.remove_result(self._place, name)

    def result_names(self) -> tuple[str, ...]:
        """Names of all results, sorted."""
        return results.result_names(self._place)

    def nbytes_on_disk(self) -> int:
        """Bytes of all files of the store."""
        return self._place.total_bytes()

    def remove_leftovers(self) -> int:
        """Remove files that killed writers left half written; returns how many. Only while nobody writes."""
        self._check_writable()
        return results.remove_leftovers(self._place)

    # -- checks

    def _check_writable(self) -> None:
        if not self._writable:
            raise StoreError(
                f"The store {self.path} is open for reading only. Open it with writable=True to change it."
            )
        if self._lease is not None:
            self._lease.check()

    def _write_plain(self, name: str, value: np.ndarray) -> None:
        self._check_writable()
        with writing(self.path, name, value.nbytes):
            checked_array(self._root, name, self._forms[name])[...] = value

    def _read_plain(self, name: str) -> np.ndarray:
        try:
            value = read_whole(self._root, name, self._forms[name])
        except (ValueError, OSError) as error:
            raise StoreError(f"The {name} in the store {self.path} is damaged ({first_line(error)}).") from error
        if np.isnan(value).any():
            raise StoreError(f"The {name} has not been written into the store {self.path} yet. Run again to resume it.")
        return value
