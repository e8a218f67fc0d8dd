"""Writing a store's own ``zarr.json`` again, from the problem that it belongs to.

Without it nothing can be read. What it said of layout and problem is known again once the problem is planned; that it is the same
problem is proved by the hash that the ledger keeps of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from disthess.errors import StoreError
from disthess.store.encode import layout_to_json, to_json
from disthess.store.hostile import trusted_layout
from disthess.store.layout import Layout
from disthess.store.make import SCHEMA, open_store_group, writing
from disthess.store.metadata import group_trouble, write_group_metadata
from disthess.store.place import ROOT, AbstractPlace
from disthess.store.raw import Objects
from disthess.store.seal import identity_of, is_unbroken, sealed


def restore_root(place: AbstractPlace, layout: Layout, attributes: Mapping[str, Any]) -> bool:
    """Write the root's ``zarr.json`` again if it is damaged.

    Args:
        place: The store.
        layout: Of the problem's plan.
        attributes: What a new store of that problem says of itself.

    Returns:
        Whether it was damaged.

    Raises:
        StoreError: It is damaged, and the ledger does not show that the store belongs to this problem and plan.
    """
    if not place.has(f"ledger/{ROOT}") or _is_whole(place):
        return False
    fresh = {"schema": SCHEMA, "dtype": layout.dtype, "layout": layout_to_json(layout), **to_json(attributes)}
    objects = Objects(place.zarr_store(writable=True))
    try:
        ledger = objects.json("ledger/zarr.json")
        kept = {} if group_trouble(ledger) else ledger["attributes"]
    except (ValueError, OSError):
        kept = {}
    if not is_unbroken(kept, needed=True) or kept.get("identity") != identity_of(fresh):
        raise StoreError(
            f"The zarr.json of the store {place.name} is damaged, and its ledger does not show that it belongs to this problem "
            f"with these options. Nothing was changed. Give the run file that it was computed from, or compute it again at "
            f"another path."
        )
    with writing(place.name, "its zarr.json", 0):
        write_group_metadata(objects, "", sealed(fresh))
    return True


def _is_whole(place: AbstractPlace) -> bool:
    try:
        attributes = open_store_group(place, writable=False).attrs.asdict()
        trusted_layout(attributes, place.name)
    except StoreError:
        return False
    return is_unbroken(attributes, needed=True)
