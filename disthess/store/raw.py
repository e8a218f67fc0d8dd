"""The objects of a store by their keys, whatever it lies on: what checks and mends below the level of arrays."""

from __future__ import annotations

import json
from typing import Any, final

import zarr
from zarr.abc.store import Store as ZarrStore
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from disthess.errors import StoreError

MOST_METADATA_BYTES = 64 << 20
"""Largest ``zarr.json`` that is read: a layout of about a million tiles."""


@final
class Objects:
    """Keys below a group: plain reads and writes of whole objects.

    Args:
        root: The store's group, or the zarr store where there is no group that can be opened.
    """

    def __init__(self, root: zarr.Group | ZarrStore) -> None:
        self._store: Any = root.store if isinstance(root, zarr.Group) else root
        self._prefix = f"{root.path}/" if isinstance(root, zarr.Group) and root.path else ""

    def exists(self, key: str) -> bool:
        """Whether there is an object of that name."""
        return bool(sync(self._store.exists(self._prefix + key)))

    def nbytes(self, key: str) -> int:
        """Its size; -1 where it is not there."""
        try:
            return int(sync(self._store.getsize(self._prefix + key)))
        except (FileNotFoundError, NotADirectoryError):
            return -1

    def json(self, key: str) -> Any:
        """Its value as JSON.

        Raises:
            ValueError: It is not there, larger than any that disthess writes, or no JSON.
        """
        size, found = sync(_sized(self._store, self._prefix + key))
        if size > MOST_METADATA_BYTES:
            raise ValueError(f"it has {size:,} bytes, more than any that disthess writes")
        if found is None:
            raise ValueError("it is not there")
        try:
            return json.loads(found.to_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"it is no JSON ({type(error).__name__})") from error

    def write(self, key: str, data: bytes) -> None:
        """Write or replace an object."""
        sync(self._store.set(self._prefix + key, default_buffer_prototype().buffer.from_bytes(data)))

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""
        if self.exists(key):
            sync(self._store.delete(self._prefix + key))

    def delete_below(self, key: str) -> None:
        """Remove everything below a name."""
        sync(self._store.delete_dir(self._prefix + key))

    def children(self, key: str) -> list[str]:
        """Names right below a name, sorted: objects and what has objects below it."""
        return sorted(name.rstrip("/") for name in sync(_listed(self._store, (self._prefix + key).rstrip("/"))))


def check_metadata_size(nbytes: int, path: str) -> None:
    """Refuse a ``zarr.json`` larger than any that is read.

    Raises:
        StoreError: It is.
    """
    if nbytes > MOST_METADATA_BYTES:
        raise StoreError(
            f"The zarr.json of the store {path} has {nbytes:,} bytes, and {MOST_METADATA_BYTES:,} are allowed: about "
            f"400,000 tiles. Select fewer parameters, or split them over several stores."
        )


async def _sized(store: Any, key: str) -> tuple[int, Any]:
    """The size of an object, and the object unless it is too large or not there."""
    try:
        size = int(await store.getsize(key))
    except (FileNotFoundError, NotADirectoryError):
        return -1, None
    if size > MOST_METADATA_BYTES:
        return size, None
    return size, await store.get(key, default_buffer_prototype())


async def _listed(store: ZarrStore, prefix: str) -> list[str]:
    # Asked inside: some stores want a running event loop already when they are asked.
    return [name async for name in store.list_dir(prefix)]
