"""The JSON files of a store against its layout, and writing them again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from disthess.store.found import Damage
from disthess.store.ledger import attributes_trouble
from disthess.store.metadata import (
    arrays_of,
    checked_array,
    group_trouble,
    groups_of,
    write_array_metadata,
    write_group_metadata,
)
from disthess.store.raw import Objects
from disthess.store.seal import identity_of, is_unbroken, sealed

if TYPE_CHECKING:
    from disthess.store.store import Store


def check_metadata(store: Store) -> list[Damage]:
    """Every ``zarr.json`` that a store has from the start, and the root's attributes."""
    objects = Objects(store.root)
    found = []
    for path in groups_of(store.layout):
        trouble = _group_trouble(objects, path)
        if trouble:
            found.append(Damage(-1, f"{path}/zarr.json", trouble, "metadata", path))
    for path, form in arrays_of(store.layout).items():
        try:
            checked_array(store.root, path, form)
        except (ValueError, OSError) as error:
            found.append(Damage(-1, f"{path}/zarr.json", str(error), "metadata", path))
    if not is_unbroken(store.root.attrs.asdict(), needed=True):
        said = "its attributes do not have the checksum that they were written with"
        found.append(Damage(-1, "zarr.json of the store", said, "attributes", "zarr.json"))
    return found


def mend_metadata(store: Store, damaged: Sequence[Damage]) -> None:
    """Write the damaged files again, from the layout; what the ledger's group said is taken for not said."""
    objects, forms = Objects(store.root), arrays_of(store.layout)
    for entry in damaged:
        if entry.kind != "metadata":
            continue
        if entry.where in forms:
            write_array_metadata(objects, entry.where, forms[entry.where])
        elif entry.where == "ledger":
            fresh = {"quarantined": {}, "reduced": False, "identity": identity_of(store.root.attrs.asdict())}
            write_group_metadata(objects, "ledger", sealed(fresh))
        else:
            write_group_metadata(objects, entry.where, {})


def _group_trouble(objects: Objects, path: str) -> str:
    try:
        value = objects.json(f"{path}/zarr.json")
    except (ValueError, OSError) as error:
        return str(error)
    trouble = group_trouble(value)
    if trouble or path != "ledger":
        return trouble
    attributes = value.get("attributes", {})
    if not is_unbroken(attributes, needed=True):
        return "its attributes do not have the checksum that they were written with"
    return attributes_trouble(attributes)
