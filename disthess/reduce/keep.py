"""Results inside the store: kept with their settings, found again when the same is asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from disthess.errors import StoreError
from disthess.reduce.hessian_store import HessianStore
from disthess.store.lock import LeaseTimes, StoreLock
from disthess.store.store import Store


def kept(target: object, name: str, settings: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """Arrays and attributes of a stored result whose settings are the same, or None."""
    if not isinstance(target, HessianStore) or not target.store.has_result(name) or target.missing_tiles():
        return None
    arrays, attributes = target.store.read_result(name)
    return (arrays, attributes) if attributes.get("settings") == dict(settings) else None


def keep(
    target: object, name: str, settings: Mapping[str, Any], arrays: Mapping[str, np.ndarray], values: Mapping[str, Any]
) -> None:
    """Store a result; where the store cannot be written (read-only, or a run holds it), the result is only returned."""
    if not isinstance(target, HessianStore) or not target.store.place.is_writable():
        return
    try:
        with StoreLock(target.store.place, LeaseTimes(wait=False)):
            Store.open(target.store.place, writable=True).write_result(
                name, arrays, {"settings": dict(settings), **values}
            )
    except StoreError:
        return
