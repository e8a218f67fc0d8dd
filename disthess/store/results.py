"""Results kept beside the panels: named groups of arrays with their settings, each whole or not there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import Store as ZarrStore

from disthess.errors import StoreError
from disthess.store.check_results import ARRAYS, read_arrays
from disthess.store.encode import from_json, to_json
from disthess.store.place import ROOT, AbstractPlace
from disthess.store.seal import sealed
from disthess.store.zarrays import create_root, open_group, write_value

RESERVED = frozenset({"panels", "uses", "ledger", "gradient", "loss", "activations"})
_MARK = "result"
_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,=+-]*")


def has_result(place: AbstractPlace, name: str) -> bool:
    """Whether the store at ``place`` has that result."""
    checked = _checked(name)
    try:
        return place.has(f"{checked}/{ROOT}") and _MARK in open_group(place, writable=False, name=name).attrs
    except Exception as error:
        raise _damaged(place.name, name, error) from error


def write_result(
    place: AbstractPlace, name: str, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any]
) -> None:
    """Write or replace a result, as a whole.

    Raises:
        StoreError: The name is not allowed, taken by something else, or an array is not numeric.
        OSError: The disk is full.
    """
    if (place.holds(_checked(name)) and not has_result(place, name)) or any(
        has_result(place, "/".join(name.split("/")[:depth])) for depth in range(1, name.count("/") + 1)
    ):
        raise StoreError(
            f"The result name {name!r} is taken by another group of the store {place.name}; choose another name."
        )
    for key, value in arrays.items():
        if _WORD.fullmatch(key) is None or np.asarray(value).dtype.kind not in "biufc":
            raise StoreError(
                f"The result {name!r} has an array {key!r} of dtype {np.asarray(value).dtype}; arrays must be numeric "
                f"and named by letters, digits, '_' and '-'. Put texts into the attributes."
            )

    def build(store: ZarrStore) -> None:
        group = create_root(store, sealed({_MARK: to_json(attributes), ARRAYS: sorted(arrays)}))
        for key, value in arrays.items():
            write_value(group, key, np.asarray(value))

    _require_parents(open_group(place, writable=True), name)
    place.publish(name, build)


def read_result(place: AbstractPlace, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and attributes of a result.

    Raises:
        StoreError: There is none of that name, or it is damaged.
    """
    if not has_result(place, name):
        known = ", ".join(result_names(place)) or "none"
        raise StoreError(f"The store {place.name} has no result {name!r}; it has: {known}.")
    try:
        arrays, attributes = read_arrays(open_group(place, writable=False), name)
    except (ValueError, OSError) as error:
        raise _damaged(place.name, name, error) from error
    return arrays, dict(from_json(attributes))


def remove_result(place: AbstractPlace, name: str) -> None:
    """Remove a result, if it is there."""
    if has_result(place, name):
        place.withdraw(name)


def result_names(place: AbstractPlace) -> tuple[str, ...]:
    """Names of all results, sorted."""
    return tuple(sorted(name for name, whole in _walk(place, "") if whole))


def remove_leftovers(place: AbstractPlace) -> int:
    """Remove what killed writers left; returns how many. Only while nobody writes."""
    return place.remove_leftovers([name for name, whole in _walk(place, "") if not whole])


def _damaged(path: str, name: str, error: Exception) -> StoreError:
    said = " ".join(str(error).split())[:300] or type(error).__name__
    return StoreError(
        f"The result {name!r} of the store {path} is damaged ({said}). Compute it again; 'disthess verify {path} --repair' "
        f"removes it."
    )


def _walk(place: AbstractPlace, name: str) -> Iterator[tuple[str, bool]]:
    """Results below a group, and names that hold no group; whether each is a result."""
    for child in place.children(name):
        inner = f"{name}/{child}" if name else child
        if inner in RESERVED or child.startswith(".") or child == ROOT:
            continue
        if not place.has(f"{inner}/{ROOT}"):
            yield inner, False
        elif has_result(place, inner):
            yield inner, True
        else:
            yield from _walk(place, inner)


def _checked(name: str) -> str:
    words = name.split("/")
    if words[0] in RESERVED or any(_WORD.fullmatch(word) is None for word in words):
        raise StoreError(
            f"{name!r} cannot name a result: use words of letters, digits, '_', '-', '.', '=' or ',' with '/' between "
            f"them, the first none of {', '.join(sorted(RESERVED))}."
        )
    return name


def _require_parents(root: zarr.Group, name: str) -> None:
    parts = name.split("/")[:-1]
    for depth in range(1, len(parts) + 1):
        root.require_group("/".join(parts[:depth]))
