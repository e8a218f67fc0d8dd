"""A layout from a file that nobody vouches for: types and bounds first, then whether it contradicts itself.

A store may be damaged, or made to do harm. Whatever it claims is checked here before a byte is allocated for it, by integers
alone and in time that grows with the file and not with what it claims.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from disthess.errors import StoreError
from disthess.store.claims import check_claims
from disthess.store.encode import layout_from_json
from disthess.store.json_fields import read_entries, read_field, read_text, read_whole, said
from disthess.store.layout import Layout
from disthess.types import PARTS

MOST_ENTRIES = 2**32
"""Entries of all parameters together, and rows or columns of any panel: a Hessian beyond it fits on no disk."""

MOST_CHUNK_ENTRIES = 2**29
"""Entries of one chunk."""

_DEPTH = 24
_KINDS = ("panels", "uses", "activations")
_FORM = {
    "schema": (int, "a whole number"),
    "dtype": (str, "a text"),
    "fingerprint": (dict, "a mapping"),
    "title": (str, "a text"),
    "sections": (dict, "a mapping"),
}


def trusted_layout(attributes: Mapping[str, Any], path: str) -> Layout:
    """The layout in a root's attributes, once all of it has been checked.

    Args:
        attributes: Of the root group, as JSON.
        path: The store, for messages.

    Raises:
        StoreError: Something in it is no such value, out of bounds, or contradicts something else; the message says where.
    """
    try:
        check_depth(attributes)
        _check_root(attributes)
        layout_json = attributes["layout"]
        _check_layout(layout_json)
        layout = layout_from_json(layout_json)
        if layout.dtype != attributes["dtype"]:
            raise ValueError(f"dtype is {attributes['dtype']!r}, that of the layout {layout.dtype!r}")
        check_claims(layout, MOST_ENTRIES, MOST_CHUNK_ENTRIES)
    except ValueError as error:
        raise StoreError(
            f"The store {path} cannot be trusted: in its zarr.json, {error}. It is damaged, or disthess has not written it. "
            f"With the problem at hand, 'disthess verify {path} --repair --config CONFIG' writes that file again; else "
            f"compute it again at another path."
        ) from error
    return layout


def check_depth(value: Any, most: int = _DEPTH) -> None:
    """Refuse values nested deeper than any that disthess writes, without recursion.

    Raises:
        ValueError: It is.
    """
    level = [value]
    for _ in range(most):
        level = [
            inner
            for entry in level
            for inner in (entry.values() if isinstance(entry, Mapping) else entry)
            if isinstance(inner, (Mapping, list))
        ]
        if not level:
            return
    raise ValueError(f"values are nested more than {most} deep")


def check_kinks(value: Any) -> None:
    """Check the attribute ``kinks``.

    Raises:
        ValueError: It is not what a run writes.
    """
    if value is None:
        return
    for index, entry in enumerate(read_entries(value, "kinks")):
        where = f"kinks[{index}]"
        for key in ("node", "op", "torch_takes"):
            read_text(read_field(entry, key, where), f"{where}.{key}")
        if "." not in entry["op"]:
            raise ValueError(f"{where}.op is {said(entry['op'])}, not the name of an operation")
        read_whole(read_field(entry, "entries", where), f"{where}.entries")
        if entry.get("samples") is not None:
            read_whole(entry["samples"], f"{where}.samples")


def _check_root(attributes: Mapping[str, Any]) -> None:
    for key, (kind, words) in _FORM.items():
        if key in attributes and (not isinstance(attributes[key], kind) or isinstance(attributes[key], bool)):
            raise ValueError(f"{key} is {said(attributes[key])}, not {words}")
    for key in ("schema", "dtype", "layout"):
        if key not in attributes:
            raise ValueError(f"{key} is missing")
    for name, text in attributes.get("sections", {}).items():
        read_text(text, f"sections[{name!r}]")
    check_kinks(attributes.get("kinks"))


def _check_layout(value: Any) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"layout is {said(value)}, not a mapping")
    if read_field(value, "dtype", "layout") not in ("float32", "float64"):
        raise ValueError(f"layout.dtype is {said(value['dtype'])}, neither float32 nor float64")
    parts = read_entries(read_field(value, "parts", "layout"), "layout.parts")
    if any(part not in PARTS for part in parts) or len(set(map(str, parts))) != len(parts):
        raise ValueError(f"layout.parts is {said(parts)}, not a list out of {', '.join(PARTS)}")
    for index, entry in enumerate(read_entries(read_field(value, "parameters", "layout"), "layout.parameters")):
        _check_parameter(entry, f"layout.parameters[{index}]")
    for index, entry in enumerate(read_entries(read_field(value, "panels", "layout"), "layout.panels")):
        _check_panel(entry, f"layout.panels[{index}]")
    for index, entry in enumerate(read_entries(read_field(value, "outputs", "layout"), "layout.outputs")):
        where = f"layout.outputs[{index}]"
        read_text(read_field(entry, "source", where), f"{where}.source")
        for number, key in enumerate(read_entries(read_field(entry, "panels", where), f"{where}.panels")):
            _check_pair(key, f"{where}.panels[{number}]", of_kind=True)
    for index, entry in enumerate(read_entries(value.get("activations", []), "layout.activations")):
        where = f"layout.activations[{index}]"
        read_text(read_field(entry, "name", where), f"{where}.name")
        _texts(read_field(entry, "modules", where), f"{where}.modules")
        _shape(read_field(entry, "shape", where), f"{where}.shape")
    read_whole(value.get("activation_samples", 0), "layout.activation_samples", MOST_ENTRIES)
    tiles = read_field(value, "tiles", "layout")
    for index, row in enumerate(read_entries(read_field(tiles, "rows", "layout.tiles"), "layout.tiles.rows")):
        where = f"layout.tiles.rows[{index}]"
        if not isinstance(row, list) or len(row) != 6:
            raise ValueError(f"{where} is {said(row)}, not six values")
        read_text(row[0], f"{where}[0]")
        for number in range(1, 6):
            read_whole(row[number], f"{where}[{number}]")


def _check_parameter(entry: Any, where: str) -> None:
    read_text(read_field(entry, "name", where), f"{where}.name")
    _texts(read_field(entry, "aliases", where), f"{where}.aliases")
    _texts(read_field(entry, "uses", where), f"{where}.uses")
    _shape(read_field(entry, "shape", where), f"{where}.shape")
    read_whole(read_field(entry, "rank", where), f"{where}.rank")
    decay = entry.get("weight_decay", 0.0)
    if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not abs(decay) <= 1e300:
        raise ValueError(f"{where}.weight_decay is {said(decay)}, not a finite number")


def _check_panel(entry: Any, where: str) -> None:
    if read_field(entry, "kind", where) not in _KINDS:
        raise ValueError(f"{where}.kind is {said(entry['kind'])}, none of {', '.join(_KINDS)}")
    read_text(read_field(entry, "source", where), f"{where}.source")
    read_whole(read_field(entry, "index", where), f"{where}.index")
    read_whole(read_field(entry, "rows", where), f"{where}.rows", MOST_ENTRIES)
    for key in ("row_chunk", "column_chunk"):
        read_whole(read_field(entry, key, where), f"{where}.{key}", MOST_CHUNK_ENTRIES, least=1)
    for key in ("diagonal", "reduced"):
        if not isinstance(read_field(entry, key, where), bool):
            raise ValueError(f"{where}.{key} is {said(entry[key])}, neither true nor false")
    for number, pair in enumerate(read_entries(read_field(entry, "targets", where), f"{where}.targets")):
        _check_pair(pair, f"{where}.targets[{number}]", of_kind=False)


def _check_pair(pair: Any, where: str, *, of_kind: bool) -> None:
    if not isinstance(pair, list) or len(pair) != 2:
        raise ValueError(f"{where} is {said(pair)}, not a name and a number")
    read_text(pair[0], f"{where}[0]")
    if of_kind and pair[0] not in _KINDS:
        raise ValueError(f"{where}[0] is {said(pair[0])}, none of {', '.join(_KINDS)}")
    read_whole(pair[1], f"{where}[1]", MOST_ENTRIES)


def _texts(value: Any, where: str) -> None:
    for index, entry in enumerate(read_entries(value, where)):
        read_text(entry, f"{where}[{index}]")


def _shape(value: Any, where: str) -> None:
    sizes = read_entries(value, where)
    for index, size in enumerate(sizes):
        read_whole(size, f"{where}[{index}]", MOST_ENTRIES)
    if len(sizes) > 64 or math.prod(sizes) > MOST_ENTRIES:
        raise ValueError(f"{where} is {said(value)}, more than {MOST_ENTRIES:,} entries")
