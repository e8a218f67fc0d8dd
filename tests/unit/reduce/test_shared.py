"""Sums over uses against the dense sum, over many layouts."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_store import TIED, Chunks, Shape, make_layout, make_store

from disthess.errors import StoreError
from disthess.reduce.hessian_store import HessianStore
from disthess.reduce.shared import reduce_shared


@pytest.mark.parametrize(
    "chunks",
    [
        Chunks(),
        Chunks(rows=3, columns=3, tile_chunks=1, summed_rows=17, summed_columns=50),
        Chunks(rows=17, columns=40, summed_rows=2, summed_columns=2),
        Chunks(rows=2, columns=4, tile_chunks=3, summed_rows=5, summed_columns=3),
    ],
    ids=str,
)
def test_sums_equal_the_dense_sum(tmp_path: Path, chunks: Chunks) -> None:
    made = make_store(tmp_path / "run.zarr", chunks=chunks, parts=("ggn",))
    reduce_shared(made.store)
    made.store.mark_reduced()
    np.testing.assert_allclose(HessianStore(made.store).dense("ggn"), made.dense["ggn"], atol=1e-12)


def test_sums_have_the_same_bytes_every_time(tmp_path: Path) -> None:
    contents = []
    for name in ("one", "two"):
        made = make_store(tmp_path / name, parts=("hessian",), dtype="float32")
        reduce_shared(made.store)
        contents.append(
            {
                f.relative_to(tmp_path / name): f.read_bytes()
                for f in (tmp_path / name / "panels").rglob("*")
                if f.is_file()
            }
        )
    assert contents[0] == contents[1]


def test_a_block_of_a_shared_parameter_is_refused_until_summed(tmp_path: Path) -> None:
    made = make_store(tmp_path / "run.zarr")
    store = HessianStore(made.store)
    with pytest.raises(StoreError, match="not summed yet"):
        store.block("tied", "bias")
    np.testing.assert_allclose(store.block("bias", "early"), made.dense["hessian"][:3, 24:30], atol=1e-12)


def test_missing_tiles_stop_the_sum(tmp_path: Path) -> None:
    tiles = make_layout(TIED, Chunks(), ("hessian",)).tiles
    lost = next(tile.index for tile in tiles if tile.source == "tied@2")
    with pytest.raises(StoreError):
        reduce_shared(make_store(tmp_path / "run.zarr", parts=("hessian",), skip=[lost]).store)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[Shape, ...], Chunks]:
    counts = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any))
    places = draw(st.permutations(range(sum(counts))))
    shapes = []
    for number, count in enumerate(counts):
        shapes.append(Shape(f"p{number}", draw(st.integers(1, 9)), tuple(sorted(places[:count]))))
        places = places[count:]
    size = st.integers(1, 10)
    return tuple(shapes), Chunks(draw(size), draw(size), draw(st.integers(1, 3)), draw(size), draw(size))


@settings(max_examples=10, deadline=None, derandomize=True)
@given(layouts())
def test_any_layout_gives_the_dense_matrix(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[tuple[Shape, ...], Chunks]
) -> None:
    place = tmp_path_factory.mktemp("any") / "run.zarr"
    shapes, chunks = case
    made = make_store(place, shapes, chunks, parts=("hessian",))
    reduce_shared(made.store)
    made.store.mark_reduced()
    store = HessianStore(made.store)
    wanted = made.dense["hessian"]
    np.testing.assert_allclose(store.dense(), wanted, atol=1e-12)
    vectors = np.random.default_rng(0).standard_normal((store.numel, 2))
    np.testing.assert_allclose(store.symmetric_operator().matmat(vectors), wanted @ vectors, atol=1e-11)
    shutil.rmtree(place)


def test_the_tied_example_has_shared_and_lost_parameters() -> None:
    assert {len(shape.places) for shape in TIED} == {0, 1, 2, 3}
