"""Results kept beside the panels: named groups of arrays with their settings, each whole or not there."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from disthess.errors import StoreError
from disthess.store.check_results import ARRAYS, read_arrays
from disthess.store.encode import from_json, to_json
from disthess.store.seal import sealed
from disthess.store.zarrays import create_root, open_root, write_value

RESERVED = frozenset({"panels", "uses", "ledger", "gradient", "loss", "activations"})
TEMPORARY = ".writing-"
_MARK = "result"
_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,=+-]*")


def has_result(path: Path, name: str) -> bool:
    """Whether the store at ``path`` has that result."""
    place = path / _checked(name)
    try:
        return (place / "zarr.json").exists() and _MARK in open_root(place, writable=False).attrs
    except Exception as error:
        raise _damaged(path, name, error) from error


def write_result(path: Path, name: str, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any]) -> None:
    """Write or replace a result: under another name first, then moved.

    Raises:
        StoreError: The name is not allowed, taken by something else, or an array is not numeric.
        OSError: The disk is full.
    """
    target = path / _checked(name)
    if (target.exists() and not has_result(path, name)) or any(
        has_result(path, "/".join(name.split("/")[:depth])) for depth in range(1, name.count("/") + 1)
    ):
        raise StoreError(
            f"The result name {name!r} is taken by another group of the store {path}; choose another name."
        )
    for key, value in arrays.items():
        if _WORD.fullmatch(key) is None or np.asarray(value).dtype.kind not in "biufc":
            raise StoreError(
                f"The result {name!r} has an array {key!r} of dtype {np.asarray(value).dtype}; arrays must be numeric "
                f"and named by letters, digits, '_' and '-'. Put texts into the attributes."
            )
    temporary = path / f"{TEMPORARY}{uuid.uuid4().hex}"
    try:
        group = create_root(temporary, sealed({_MARK: to_json(attributes), ARRAYS: sorted(arrays)}))
        for key, value in arrays.items():
            write_value(group, key, np.asarray(value))
        _require_parents(open_root(path, writable=True), name)
        _move(temporary, target, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_result(path: Path, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and attributes of a result.

    Raises:
        StoreError: There is none of that name, or it is damaged.
    """
    if not has_result(path, name):
        known = ", ".join(result_names(path)) or "none"
        raise StoreError(f"The store {path} has no result {name!r}; it has: {known}.")
    try:
        arrays, attributes = read_arrays(open_root(path, writable=False), name)
    except (ValueError, OSError) as error:
        raise _damaged(path, name, error) from error
    return arrays, dict(from_json(attributes))


def remove_result(path: Path, name: str) -> None:
    """Remove a result, if it is there."""
    if has_result(path, name):
        old = path / f"{TEMPORARY}{uuid.uuid4().hex}"
        os.rename(path / name, old)
        shutil.rmtree(old, ignore_errors=True)


def result_names(path: Path) -> tuple[str, ...]:
    """Names of all results, sorted."""
    return tuple(sorted(_walk(path, path)))


def remove_leftovers(path: Path) -> int:
    """Remove what killed writers left; returns how many. Only while nobody writes."""
    left = [*path.glob(f"{TEMPORARY}*")]
    for place in left:
        shutil.rmtree(place, ignore_errors=True)
    return len(left)


def _damaged(path: Path, name: str, error: Exception) -> StoreError:
    said = " ".join(str(error).split())[:300] or type(error).__name__
    return StoreError(
        f"The result {name!r} of the store {path} is damaged ({said}). Compute it again; 'disthess verify {path} --repair' "
        f"removes it."
    )


def _walk(path: Path, place: Path) -> Iterator[str]:
    for child in sorted(place.iterdir()):
        name = child.relative_to(path).as_posix()
        if name in RESERVED or child.name.startswith(".") or not (child / "zarr.json").exists():
            continue
        if has_result(path, name):
            yield name
        else:
            yield from _walk(path, child)


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


def _move(temporary: Path, target: Path, path: Path) -> None:
    old = path / f"{TEMPORARY}{uuid.uuid4().hex}"
    if target.exists():
        os.rename(target, old)
    os.rename(temporary, target)
    shutil.rmtree(old, ignore_errors=True)
