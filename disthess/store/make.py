"""Making a store under another name and moving it in place; opening one with an error for each way of not being one."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from disthess.errors import StoreError
from disthess.store.check_layout import check_layout
from disthess.store.encode import layout_to_json, to_json
from disthess.store.layout import Layout
from disthess.store.ledger import create_ledger
from disthess.store.raw import check_metadata_size
from disthess.store.seal import SEAL, sealed
from disthess.store.zarrays import create_plain, create_root, open_root
from disthess.units import human_bytes

SCHEMA = 1
RESERVED_ATTRIBUTES = frozenset({"schema", "dtype", "layout", SEAL})

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def make_store(path: str | os.PathLike[str], layout: Layout, attributes: Mapping[str, Any]) -> Path:
    """Create a store whose tiles are all missing; returns its absolute path.

    Raises:
        StoreError: Something is at ``path`` already, or it cannot be written there.
        ValueError: The layout contradicts itself.
    """
    check_layout(layout)
    place = local_path(path)
    if place.exists() or place.is_symlink():
        _refuse_existing(place)
    temporary = place.with_name(f".{place.name}.creating-{uuid.uuid4().hex[:12]}")
    try:
        with writing(str(place), "its metadata", 0):
            place.parent.mkdir(parents=True, exist_ok=True)
            _create(temporary, layout, attributes)
            os.rename(temporary, place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return place


def open_store_group(path: str | os.PathLike[str], *, writable: bool) -> zarr.Group:
    """The group of the store at ``path``.

    Raises:
        StoreError: Nothing is there, it is no store, damaged, of a newer schema, or not writable.
    """
    place = local_path(path)
    if not place.exists():
        raise StoreError(f"There is no store at {place}. Check the path, or compute one with 'disthess run'.")
    if not place.is_dir():
        raise StoreError(f"{place} is a file; a store is a directory, such as runs/digits_mlp.zarr.")
    if not (place / "zarr.json").exists():
        raise StoreError(
            f"The directory {place} is no store: it has no zarr.json. Give the path of a store that 'disthess run' has "
            f"written (the directory itself, not its parent)."
        )
    check_metadata_size((place / "zarr.json").stat().st_size, str(place))
    try:
        root = open_root(place, writable=writable)
        schema = root.attrs.asdict().get("schema")
        layout = root.attrs.asdict().get("layout")
    except Exception as error:
        raise StoreError(
            f"The store {place} cannot be opened: its zarr.json is damaged or is no Zarr group of format 3 "
            f"({first_line(error)}). Compute it again at another path."
        ) from error
    if not isinstance(schema, int) or schema < 1 or not isinstance(layout, Mapping):
        raise StoreError(f"{place} is a Zarr group, but not one that disthess has written: it says no schema.")
    if schema > SCHEMA:
        raise StoreError(
            f"The store {place} has schema {schema}; this version of disthess reads schema {SCHEMA}. Install a newer one."
        )
    if writable and not os.access(place, os.W_OK):
        raise StoreError(f"The store {place} cannot be written by this user. Copy it, or change its permissions.")
    return root


def local_path(path: str | os.PathLike[str]) -> Path:
    """The absolute path; the one place that knows that stores lie on a file system.

    Raises:
        StoreError: It is a URL.
    """
    text = os.fspath(path)
    if "\0" in text:
        raise StoreError(f"The path {text!r} of a store has a zero byte in it. Give a path, such as runs/digits.zarr.")
    if "://" in text:
        raise StoreError(
            f"The store {text} is a URL; stores lie on a file system. Give a path, such as runs/digits.zarr."
        )
    return Path(text).expanduser().absolute()


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


def first_line(error: BaseException) -> str:
    """The first line of an error's text, cut to a length that fits a message."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def _refuse_existing(place: Path) -> None:
    if (place / "zarr.json").exists():
        raise StoreError(
            f"{place} exists already; open it to resume it, or choose another path. Nothing was overwritten."
        )
    raise StoreError(
        f"{place} exists already and is no store. Choose another path, or remove it. Nothing was overwritten."
    )


def _create(temporary: Path, layout: Layout, attributes: Mapping[str, Any]) -> None:
    fixed = {"schema": SCHEMA, "dtype": layout.dtype, "layout": layout_to_json(layout)}
    taken = RESERVED_ATTRIBUTES.intersection(attributes)
    if taken:
        raise ValueError(f"the attributes {sorted(taken)} are the store's own")
    root = create_root(temporary, sealed({**fixed, **to_json(attributes)}))
    check_metadata_size((temporary / "zarr.json").stat().st_size, str(temporary))
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
