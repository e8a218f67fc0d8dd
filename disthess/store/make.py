"""Making a store, whole or not at all; opening one with an error for each way of not being one."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import Store as ZarrStore

from disthess.errors import StoreError
from disthess.store.check_layout import check_layout
from disthess.store.encode import layout_to_json, to_json
from disthess.store.layout import Layout
from disthess.store.ledger import create_ledger
from disthess.store.place import ROOT, AbstractPlace, first_line, place_of
from disthess.store.raw import Objects, check_metadata_size
from disthess.store.seal import SEAL, sealed
from disthess.store.zarrays import create_plain, create_root, open_group
from disthess.units import human_bytes

SCHEMA = 1
RESERVED_ATTRIBUTES = frozenset({"schema", "dtype", "layout", SEAL})

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def make_store(
    path: str | os.PathLike[str] | AbstractPlace, layout: Layout, attributes: Mapping[str, Any]
) -> AbstractPlace:
    """Create a store whose tiles are all missing; returns its place.

    Raises:
        StoreError: Something is at ``path`` already, or it cannot be written there.
        ValueError: The layout contradicts itself.
    """
    check_layout(layout)
    place = place_of(path)
    if not place.is_free():
        refuse_existing(place)
    with writing(place.name, "its metadata", 0):
        place.make(lambda store: _create(store, layout, attributes))
    return place


def open_store_group(place: AbstractPlace, *, writable: bool) -> zarr.Group:
    """The group of the store at a place.

    Raises:
        StoreError: Nothing is there, it is no store, damaged, of a newer schema, or not writable.
    """
    place.check_group()
    check_metadata_size(Objects(place.zarr_store(writable=False)).nbytes(ROOT), place.name)
    try:
        root = open_group(place, writable=writable)
        schema = root.attrs.asdict().get("schema")
        layout = root.attrs.asdict().get("layout")
    except StoreError:
        raise
    except Exception as error:
        raise StoreError(
            f"The store {place.name} cannot be opened: its zarr.json is damaged or is no Zarr group of format 3 "
            f"({first_line(error)}). Compute it again at another path."
        ) from error
    if "cache" in root.attrs.asdict():
        raise StoreError(
            f"{place.name} is a cache of single blocks and no whole Hessian. Open it by disthess.open_cache; on the command line, "
            f"'disthess info', 'block' and 'verify' read it."
        )
    if not isinstance(schema, int) or schema < 1 or not isinstance(layout, Mapping):
        raise StoreError(f"{place.name} is a Zarr group, but not one that disthess has written: it says no schema.")
    if schema > SCHEMA:
        raise StoreError(
            f"The store {place.name} has schema {schema}; this version of disthess reads schema {SCHEMA}. Install a newer one."
        )
    if writable and not place.is_writable():
        raise StoreError(f"The store {place.name} cannot be written by this user. Copy it, or change its permissions.")
    return root


@contextlib.contextmanager
def writing(path: str, what: str, needed_bytes: int) -> Iterator[None]:
    """Turn the system's errors while writing into ours, with sizes.

    Raises:
        StoreError: The disk is full, or cannot be written.
    """
    try:
        yield
    except OSError as error:
        size = f" ({human_bytes(needed_bytes)})" if needed_bytes else ""
        if error.errno in _FULL:
            raise StoreError(
                f"No space is left on the disk of {path}, while writing {what}{size}. What is marked done stays; free "
                f"some space and run again, which resumes."
            ) from error
        raise StoreError(
            f"{path} cannot be written, while writing {what}{size}: {error.strerror or error}. What is marked done "
            f"stays; once it can be written, run again, which resumes."
        ) from error


def refuse_existing(place: AbstractPlace) -> None:
    """Refuse a place where something is.

    Raises:
        StoreError: Always.
    """
    if place.has(ROOT):
        raise StoreError(
            f"{place.name} exists already; open it to resume it, or choose another path. Nothing was overwritten."
        )
    raise StoreError(
        f"{place.name} exists already and is no store. Choose another path, or remove it. Nothing was overwritten."
    )


def _create(store: ZarrStore, layout: Layout, attributes: Mapping[str, Any]) -> None:
    fixed = {"schema": SCHEMA, "dtype": layout.dtype, "layout": layout_to_json(layout)}
    taken = RESERVED_ATTRIBUTES.intersection(attributes)
    if taken:
        raise ValueError(f"the attributes {sorted(taken)} are the store's own")
    root = create_root(store, sealed({**fixed, **to_json(attributes)}))
    check_metadata_size(Objects(store).nbytes(ROOT), "to be made")
    for kind in sorted({panel.kind for panel in layout.panels}):
        for part in layout.parts:
            root.require_group(f"{kind}/{part}")
    dtype = np.dtype(layout.dtype)
    nan = float("nan")
    for panel in layout.panels:
        chunks = (panel.row_chunk, panel.column_chunk)
        for part in layout.parts:
            create_plain(root, panel.path(part), (panel.rows, panel.columns), dtype, chunks, nan)
    double = np.dtype("float64")
    create_plain(root, "gradient", (layout.numel,), double, (max(1, layout.numel),), nan)
    create_plain(root, "loss", (), double, (), nan)
    create_ledger(root, len(layout.tiles))
