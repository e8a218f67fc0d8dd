"""The results of a store: whole and as they were written, before anything is allocated for them."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

from disthess.store.found import Damage
from disthess.store.hostile import check_depth
from disthess.store.metadata import CHECKSUM_BYTES, array_trouble, checked_array, group_trouble, write_group_metadata
from disthess.store.raw import Objects
from disthess.store.seal import is_unbroken

if TYPE_CHECKING:
    from disthess.store.store import Store

MARK = "result"
"""The attribute that makes a group a result: its settings."""

ARRAYS = "arrays"
"""The attribute that lists its arrays."""

OWN = frozenset({"panels", "uses", "ledger", "gradient", "loss", "activations"})
"""Names at the top that are no results."""

_DEPTH = 8
_MOST_CHUNKS = 1_000_000


def read_arrays(root: zarr.Group, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and attributes of the result at a path, checked first: whole, numeric, and no larger than its files.

    Raises:
        ValueError: It is damaged; the message says what.
        OSError: It cannot be read.
    """
    objects = Objects(root)
    value = objects.json(f"{name}/zarr.json")
    check_depth(value)
    trouble = group_trouble(value)
    attributes = value.get("attributes", {}) if not trouble else {}
    if trouble or not isinstance(attributes.get(MARK), Mapping):
        raise ValueError(trouble or "its zarr.json does not say that it is a result")
    if not is_unbroken(attributes):
        raise ValueError("its attributes do not have the checksum that they were written with")
    below = [child for child in objects.children(name) if not child.startswith(".") and child != "zarr.json"]
    listed = attributes.get(ARRAYS, below)
    if not isinstance(listed, list) or not all(isinstance(key, str) and key in below for key in listed):
        raise ValueError(f"it should have the arrays {listed!r:.200}, and has {below!r:.200}")
    arrays = {}
    for key in listed:
        check_whole(objects, f"{name}/{key}")
        arrays[key] = np.asarray(checked_array(root, f"{name}/{key}", None)[...])
    return arrays, attributes[MARK]


def check_results(store: Store) -> list[Damage]:
    """Damage of every result, and of what lies between results."""
    return list(_walk(store.root, Objects(store.root), "", 0))


def remove_damaged(store: Store, damaged: Sequence[Damage], stale: Collection[str]) -> None:
    """Remove damaged results, and those whose first word is in ``stale``; mend groups between results."""
    objects = Objects(store.root)
    for entry in damaged:
        if entry.kind == "result" and entry.message.endswith(_BETWEEN):
            write_group_metadata(objects, entry.where, {})
        elif entry.kind == "result":
            objects.delete_below(entry.where)
    for word in stale:
        if word not in OWN and word in objects.children(""):
            objects.delete_below(word)


_BETWEEN = "; results lie below it"


def _walk(root: zarr.Group, objects: Objects, path: str, depth: int) -> Iterator[Damage]:
    for child in objects.children(path):
        name = f"{path}/{child}" if path else child
        if name in OWN or child.startswith(".") or child == "zarr.json" or objects.exists(name):
            continue
        try:
            value = objects.json(f"{name}/zarr.json")
            trouble = group_trouble(value)
        except (ValueError, OSError) as error:
            value, trouble = {}, str(error)
        if trouble:
            between = depth < _DEPTH and _has_results(objects, name)
            yield Damage(-1, f"{name}/zarr.json", trouble + (_BETWEEN if between else ""), "result", name)
            if not between:
                continue
        elif MARK in value.get("attributes", {}):
            try:
                if not is_unbroken(value["attributes"], needed=True):
                    raise ValueError("its attributes do not have the checksum that they were written with")
                read_arrays(root, name)
            except (ValueError, OSError) as error:
                yield Damage(-1, f"the result {name}", str(error), "result", name)
            continue
        if depth < _DEPTH:
            yield from _walk(root, objects, name, depth + 1)


def _has_results(objects: Objects, name: str) -> bool:
    """Whether a result lies right below, so that the name is that of a group between results."""
    for child in objects.children(name):
        try:
            value = objects.json(f"{name}/{child}/zarr.json")
        except (ValueError, OSError):
            continue
        if not group_trouble(value):
            return True
    return False


def check_whole(objects: Objects, path: str) -> None:
    """Refuse an array that has not every chunk at full size: nothing is then allocated that has no bytes on the disk.

    Raises:
        ValueError: Its zarr.json is wrong, or a chunk is missing or of another size.
    """
    value = objects.json(f"{path}/zarr.json")
    trouble = array_trouble(value, None)
    if trouble:
        raise ValueError(f"of {path}/zarr.json, {trouble}")
    shape, chunks = value["shape"], value["chunk_grid"]["configuration"]["chunk_shape"]
    grid = [-(-size // chunk) for size, chunk in zip(shape, chunks)]
    if np.prod(grid, dtype=float) > _MOST_CHUNKS:
        raise ValueError(f"{path} has more than {_MOST_CHUNKS:,} chunks")
    wanted = int(np.prod(chunks, dtype=object)) * np.dtype(value["data_type"]).itemsize + CHECKSUM_BYTES
    for place in itertools.product(*(range(count) for count in grid)):
        key = "/".join([path, "c", *map(str, place)])
        found = objects.nbytes(key)
        if found != wanted:
            raise ValueError(f"{key} {'is not there' if found < 0 else f'has {found:,} bytes of {wanted:,}'}")
