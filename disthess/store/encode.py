"""Layouts and attributes as JSON values, and back.

Round trip of a layout is exact, but for what is not part of a store: a tile's owner and its bound of memory come back as 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from disthess.store.layout import ActivationSpec, Layout, PanelKind, PanelSpec, ParameterSpec, Tile
from disthess.types import DType, Part, Span

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def layout_to_json(layout: Layout) -> dict[str, Any]:
    """A layout as nested dicts and lists of strings and integers; owners and memory bounds are left out.

    >>> from disthess.store.layout import Layout
    >>> layout_from_json(layout_to_json(Layout((), (), (), (), ("hessian",), "float64"))).dtype
    'float64'
    """
    return {
        "dtype": layout.dtype,
        "parts": list(layout.parts),
        "parameters": [
            {
                "name": parameter.name,
                "aliases": list(parameter.aliases),
                "shape": list(parameter.shape),
                "rank": parameter.rank,
                "uses": list(parameter.uses),
                "weight_decay": parameter.weight_decay,
            }
            for parameter in layout.parameters
        ],
        "panels": [
            {
                "kind": panel.kind,
                "index": panel.index,
                "source": panel.source,
                "rows": panel.rows,
                "targets": [[name, numel] for name, numel in panel.targets],
                "row_chunk": panel.row_chunk,
                "column_chunk": panel.column_chunk,
                "diagonal": panel.diagonal,
                "reduced": panel.reduced,
            }
            for panel in layout.panels
        ],
        "outputs": [
            {"source": source, "panels": [[kind, index] for kind, index in keys]} for source, keys in layout.outputs
        ],
        "activations": [
            {"name": entry.name, "modules": list(entry.modules), "shape": list(entry.shape)}
            for entry in layout.activations
        ],
        "activation_samples": layout.activation_samples,
        "tiles": {
            "columns": ["source", "start", "stop", "wave", "flops", "written_bytes"],
            "rows": [
                [tile.source, tile.span.start, tile.span.stop, tile.wave, tile.flops, tile.written_bytes]
                for tile in layout.tiles
            ],
        },
    }


def layout_from_json(value: Mapping[str, Any]) -> Layout:
    """The layout that ``layout_to_json`` wrote; ``owner`` and ``memory_bytes`` of its tiles are 0.

    Raises:
        KeyError: A field is missing.
        ValueError: A field has another form.
    """
    return Layout(
        parameters=tuple(_parameter(entry) for entry in value["parameters"]),
        panels=tuple(_panel(entry) for entry in value["panels"]),
        outputs=tuple(
            (str(entry["source"]), tuple((cast(PanelKind, kind), int(index)) for kind, index in entry["panels"]))
            for entry in value["outputs"]
        ),
        tiles=tuple(_tile(index, row) for index, row in enumerate(value["tiles"]["rows"])),
        parts=tuple(cast(Part, part) for part in value["parts"]),
        dtype=cast(DType, value["dtype"]),
        activations=tuple(_activation(entry) for entry in value.get("activations", ())),
        activation_samples=int(value.get("activation_samples", 0)),
    )


def to_json(value: Any) -> Any:
    """A JSON value: mappings, sequences, numpy scalars and arrays are turned; numbers that are not finite become strings.

    >>> to_json({"a": np.float64("nan"), "b": (1, np.int64(2))})
    {'a': 'NaN', 'b': [1, 2]}

    Raises:
        TypeError: Something has no JSON form.
    """
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, Mapping):
        return {str(key): to_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_json(entry) for entry in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, np.ndarray):
        return to_json(value.tolist())
    if isinstance(value, np.generic):
        return to_json(value.item())
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        if math.isnan(value):
            return "NaN"
        return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")
    raise TypeError(f"an attribute of a store must be a JSON value, got {type(value).__name__}: {value!r}")


def from_json(value: Any) -> Any:
    """What ``to_json`` was given, with lists for sequences; the three strings for numbers that are not finite come back."""
    if isinstance(value, dict):
        return {key: from_json(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [from_json(entry) for entry in value]
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    return value


def _parameter(entry: Mapping[str, Any]) -> ParameterSpec:
    return ParameterSpec(
        name=str(entry["name"]),
        aliases=tuple(entry["aliases"]),
        shape=tuple(int(size) for size in entry["shape"]),
        rank=int(entry["rank"]),
        uses=tuple(entry["uses"]),
        weight_decay=float(entry.get("weight_decay", 0.0)),
    )


def _activation(entry: Mapping[str, Any]) -> ActivationSpec:
    return ActivationSpec(str(entry["name"]), tuple(entry["modules"]), tuple(int(size) for size in entry["shape"]))


def _panel(entry: Mapping[str, Any]) -> PanelSpec:
    return PanelSpec(
        kind=entry["kind"],
        index=int(entry["index"]),
        source=str(entry["source"]),
        rows=int(entry["rows"]),
        targets=tuple((str(name), int(numel)) for name, numel in entry["targets"]),
        row_chunk=int(entry["row_chunk"]),
        column_chunk=int(entry["column_chunk"]),
        diagonal=bool(entry["diagonal"]),
        reduced=bool(entry["reduced"]),
    )


def _tile(index: int, row: list[Any]) -> Tile:
    source, start, stop, wave, flops, written_bytes = row
    return Tile(
        index=index,
        source=str(source),
        span=Span(int(start), int(stop)),
        wave=int(wave),
        owner=0,
        flops=int(flops),
        written_bytes=int(written_bytes),
        memory_bytes=0,
    )
