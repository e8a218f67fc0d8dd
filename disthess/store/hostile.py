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
from disthess.store.layout import Layout
from disthess.types import PARTS

MOST_ENTRIES = 2**32
"""Entries of all parameters together, and rows or columns of any panel: a Hessian beyond it fits on no disk."""

MOST_CHUNK_ENTRIES = 2**29
"""Entries of one chunk."""

_MOST_INTEGER = 2**63 - 1
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
    for index, entry in enumerate(_entries(value, "kinks")):
        where = f"kinks[{index}]"
        for key in ("node", "op", "torch_takes"):
            _text(_field(entry, key, where), f"{where}.{key}")
        if "." not in entry["op"]:
            raise ValueError(f"{where}.op is {_shown(entry['op'])}, not the name of an operation")
        _whole(_field(entry, "entries", where), f"{where}.entries")
        if entry.get("samples") is not None:
            _whole(entry["samples"], f"{where}.samples")


def _check_root(attributes: Mapping[str, Any]) -> None:
    for key, (kind, words) in _FORM.items():
        if key in attributes and (not isinstance(attributes[key], kind) or isinstance(attributes[key], bool)):
            raise ValueError(f"{key} is {_shown(attributes[key])}, not {words}")
    for key in ("schema", "dtype", "layout"):
        if key not in attributes:
            raise ValueError(f"{key} is missing")
    for name, text in attributes.get("sections", {}).items():
        _text(text, f"sections[{name!r}]")
    check_kinks(attributes.get("kinks"))


def _check_layout(value: Any) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"layout is {_shown(value)}, not a mapping")
    if _field(value, "dtype", "layout") not in ("float32", "float64"):
        raise ValueError(f"layout.dtype is {_shown(value['dtype'])}, neither float32 nor float64")
    parts = _entries(_field(value, "parts", "layout"), "layout.parts")
    if any(part not in PARTS for part in parts) or len(set(map(str, parts))) != len(parts):
        raise ValueError(f"layout.parts is {_shown(parts)}, not a list out of {', '.join(PARTS)}")
    for index, entry in enumerate(_entries(_field(value, "parameters", "layout"), "layout.parameters")):
        _check_parameter(entry, f"layout.parameters[{index}]")
    for index, entry in enumerate(_entries(_field(value, "panels", "layout"), "layout.panels")):
        _check_panel(entry, f"layout.panels[{index}]")
    for index, entry in enumerate(_entries(_field(value, "outputs", "layout"), "layout.outputs")):
        where = f"layout.outputs[{index}]"
        _text(_field(entry, "source", where), f"{where}.source")
        for number, key in enumerate(_entries(_field(entry, "panels", where), f"{where}.panels")):
            _check_pair(key, f"{where}.panels[{number}]", of_kind=True)
    for index, entry in enumerate(_entries(value.get("activations", []), "layout.activations")):
        where = f"layout.activations[{index}]"
        _text(_field(entry, "name", where), f"{where}.name")
        _texts(_field(entry, "modules", where), f"{where}.modules")
        _shape(_field(entry, "shape", where), f"{where}.shape")
    _whole(value.get("activation_samples", 0), "layout.activation_samples", MOST_ENTRIES)
    tiles = _field(value, "tiles", "layout")
    for index, row in enumerate(_entries(_field(tiles, "rows", "layout.tiles"), "layout.tiles.rows")):
        where = f"layout.tiles.rows[{index}]"
        if not isinstance(row, list) or len(row) != 6:
            raise ValueError(f"{where} is {_shown(row)}, not six values")
        _text(row[0], f"{where}[0]")
        for number in range(1, 6):
            _whole(row[number], f"{where}[{number}]")


def _check_parameter(entry: Any, where: str) -> None:
    _text(_field(entry, "name", where), f"{where}.name")
    _texts(_field(entry, "aliases", where), f"{where}.aliases")
    _texts(_field(entry, "uses", where), f"{where}.uses")
    _shape(_field(entry, "shape", where), f"{where}.shape")
    _whole(_field(entry, "rank", where), f"{where}.rank")
    decay = entry.get("weight_decay", 0.0)
    if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not abs(decay) <= 1e300:
        raise ValueError(f"{where}.weight_decay is {_shown(decay)}, not a finite number")


def _check_panel(entry: Any, where: str) -> None:
    if _field(entry, "kind", where) not in _KINDS:
        raise ValueError(f"{where}.kind is {_shown(entry['kind'])}, none of {', '.join(_KINDS)}")
    _text(_field(entry, "source", where), f"{where}.source")
    _whole(_field(entry, "index", where), f"{where}.index")
    _whole(_field(entry, "rows", where), f"{where}.rows", MOST_ENTRIES)
    for key in ("row_chunk", "column_chunk"):
        _whole(_field(entry, key, where), f"{where}.{key}", MOST_CHUNK_ENTRIES, least=1)
    for key in ("diagonal", "reduced"):
        if not isinstance(_field(entry, key, where), bool):
            raise ValueError(f"{where}.{key} is {_shown(entry[key])}, neither true nor false")
    for number, pair in enumerate(_entries(_field(entry, "targets", where), f"{where}.targets")):
        _check_pair(pair, f"{where}.targets[{number}]", of_kind=False)


def _check_pair(pair: Any, where: str, *, of_kind: bool) -> None:
    if not isinstance(pair, list) or len(pair) != 2:
        raise ValueError(f"{where} is {_shown(pair)}, not a name and a number")
    _text(pair[0], f"{where}[0]")
    if of_kind and pair[0] not in _KINDS:
        raise ValueError(f"{where}[0] is {_shown(pair[0])}, none of {', '.join(_KINDS)}")
    _whole(pair[1], f"{where}[1]", MOST_ENTRIES)


def _field(entry: Any, key: str, where: str) -> Any:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} is {_shown(entry)}, not a mapping")
    if key not in entry:
        raise ValueError(f"{where}.{key} is missing")
    return entry[key]


def _entries(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{where} is {_shown(value)}, not a list")
    return value


def _text(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{where} is {_shown(value)}, not a text")


def _texts(value: Any, where: str) -> None:
    for index, entry in enumerate(_entries(value, where)):
        _text(entry, f"{where}[{index}]")


def _whole(value: Any, where: str, most: int = _MOST_INTEGER, least: int = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{where} is {_shown(value)}, not a whole number from {least} to {most:,}")


def _shape(value: Any, where: str) -> None:
    sizes = _entries(value, where)
    for index, size in enumerate(sizes):
        _whole(size, f"{where}[{index}]", MOST_ENTRIES)
    if len(sizes) > 64 or math.prod(sizes) > MOST_ENTRIES:
        raise ValueError(f"{where} is {_shown(value)}, more than {MOST_ENTRIES:,} entries")


def _shown(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of more than 60 digits"
    if isinstance(value, (list, Mapping)) and len(value) > 8:
        return f"a {'list' if isinstance(value, list) else 'mapping'} of {len(value)} entries"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
