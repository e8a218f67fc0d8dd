from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disthess.store.encode import from_json, layout_from_json, layout_to_json, to_json
from disthess.store.layout import Layout, PanelSpec, ParameterSpec, Tile
from disthess.types import Span

names = st.text(min_size=1, max_size=6)
counts = st.integers(1, 9)

panels = st.builds(
    PanelSpec,
    kind=st.sampled_from(["panels", "uses"]),
    index=st.integers(0, 99),
    source=names,
    rows=counts,
    targets=st.lists(st.tuples(names, counts), max_size=3).map(tuple),
    row_chunk=counts,
    column_chunk=counts,
    diagonal=st.booleans(),
    reduced=st.booleans(),
)
parameters = st.builds(
    ParameterSpec,
    name=names,
    aliases=st.lists(names, max_size=2).map(tuple),
    shape=st.lists(counts, max_size=3).map(tuple),
    rank=counts,
    uses=st.lists(names, max_size=2).map(tuple),
)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    some = draw(st.lists(panels, max_size=4))
    tiles = tuple(
        Tile(i, draw(names), Span(start, start + draw(counts)), draw(counts), draw(counts), 10**15 + i, i, draw(counts))
        for i, start in enumerate(draw(st.lists(st.integers(0, 50), max_size=4)))
    )
    return Layout(
        parameters=tuple(draw(st.lists(parameters, max_size=3))),
        panels=tuple(some),
        outputs=tuple((panel.source, ((panel.kind, panel.index),)) for panel in some),
        tiles=tiles,
        parts=draw(st.sampled_from([("hessian",), ("hessian", "ggn"), ("residual",)])),
        dtype=draw(st.sampled_from(["float32", "float64"])),
    )


@given(layouts())
def test_layouts_round_trip_but_for_owners_and_memory(layout: Layout) -> None:
    text = json.dumps(layout_to_json(layout), allow_nan=False)
    bare = tuple(replace(tile, owner=0, memory_bytes=0) for tile in layout.tiles)
    assert layout_from_json(json.loads(text)) == replace(layout, tiles=bare)


def test_owners_do_not_change_the_text() -> None:
    tile = Tile(0, "w", Span(0, 2), 0, 0, 1, 2, 3)
    layouts = [Layout((), (), (), (replace(tile, owner=owner),), ("ggn",), "float32") for owner in (0, 5)]
    assert layout_to_json(layouts[0]) == layout_to_json(layouts[1])


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), 1.5, None, True, [1, "a", {"b": -2}], {"x": []}])
def test_attributes_round_trip(value: object) -> None:
    assert from_json(json.loads(json.dumps(to_json(value), allow_nan=False))) == value


def test_numpy_becomes_json_and_nan_comes_back() -> None:
    back = from_json(to_json({"a": np.arange(3), "b": np.float32(0.5), "c": np.bool_(True), "d": float("nan")}))
    assert (back["a"], back["b"], back["c"]) == ([0, 1, 2], 0.5, True)
    assert np.isnan(back["d"])


def test_what_has_no_json_form_is_refused() -> None:
    with pytest.raises(TypeError, match="must be a JSON value, got object"):
        to_json({"a": [object()]})
