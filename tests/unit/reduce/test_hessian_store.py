"""Blocks, whole matrices, norms and products of a store against the dense matrix that was written."""

from __future__ import annotations

from pathlib import Path

import dask.array as da
import numpy as np
import pytest
from random_store import PLAIN, TIED, Chunks, Made, Shape, make_layout, make_store
from scipy.sparse.linalg import eigsh

from disthess.errors import StoreError, UnknownNameError
from disthess.reduce.arrays import PanelReader
from disthess.reduce.chunks import ChunkFiles
from disthess.reduce.hessian_store import HessianStore
from disthess.reduce.operator import StoreOperator
from disthess.reduce.shared import reduce_shared
from disthess.types import Part, Span

PARTS: tuple[Part, ...] = ("hessian", "ggn", "residual")


@pytest.fixture(scope="module", params=["tied", "plain", "coarse"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    place = tmp_path_factory.mktemp(request.param) / "run.zarr"
    coarse = Chunks(rows=64, columns=3, summed_rows=64, summed_columns=64)
    found = make_store(
        place, PLAIN if request.param == "plain" else TIED, coarse if request.param == "coarse" else Chunks()
    )
    reduce_shared(found.store)
    found.store.mark_reduced()
    return found


def spans(shapes: tuple[Shape, ...]) -> dict[str, slice]:
    ends = np.cumsum([0, *(shape.numel for shape in shapes)])
    return {shape.name: slice(a, b) for shape, a, b in zip(shapes, ends, ends[1:])}


@pytest.mark.parametrize("part", PARTS)
def test_every_block_is_that_of_the_dense_matrix(made: Made, part: Part) -> None:
    store = HessianStore(made.store)
    places = spans(tuple(Shape(p.name, p.numel, ()) for p in store.parameters))
    for a, rows in places.items():
        for b, columns in places.items():
            found = store.block(a, b, part)
            np.testing.assert_allclose(found, made.dense[part][rows, columns], atol=1e-12)
            np.testing.assert_array_equal(found, store.block(b, a, part).T)
            lazy = store.block(a, f"{b}.alias", part, lazy=True)
            assert isinstance(lazy, da.Array)
            assert lazy.shape == found.shape
            np.testing.assert_array_equal(lazy.compute(scheduler="sync"), found)


@pytest.mark.parametrize("part", PARTS)
def test_dense_and_dask_are_the_same_exactly_symmetric_matrix(made: Made, part: Part) -> None:
    store = HessianStore(made.store)
    dense = store.dense(part)
    np.testing.assert_allclose(dense, made.dense[part], atol=1e-12)
    np.testing.assert_array_equal(dense, dense.T)
    np.testing.assert_array_equal(store.dask(part).compute(scheduler="sync"), dense)


def test_a_parameter_that_is_not_reached_has_zero_blocks(made: Made) -> None:
    store = HessianStore(made.store)
    for parameter in store.parameters:
        assert not store.block("lost", parameter.name).any()


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_products_are_those_of_the_dense_matrix(made: Made, part: Part, cache_bytes: int) -> None:
    operator = StoreOperator(PanelReader(made.store, part), cache_bytes)
    vectors = np.random.default_rng(1).standard_normal((operator.size, 3))
    first = operator.matmat(vectors)
    np.testing.assert_allclose(first, made.dense[part] @ vectors, atol=1e-11)
    np.testing.assert_array_equal(operator.matmat(vectors), first)
    np.testing.assert_array_equal(StoreOperator(PanelReader(made.store, part), 0).matmat(vectors), first)


def test_products_norms_and_dense_read_every_stored_entry_once(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[str, Span, Span]] = []
    read = PanelReader.read

    def counted(self: PanelReader, panel, rows: Span, columns: Span) -> np.ndarray:  # type: ignore[no-untyped-def]
        reads.append((panel.source, rows, columns))
        return read(self, panel, rows, columns)

    monkeypatch.setattr(PanelReader, "read", counted)
    expected = [
        (panel.source, start)
        for panel in made.store.layout.panels
        if panel.kind == "panels"
        for start in range(0, panel.rows, panel.row_chunk)
    ]
    files: list[tuple[str, int, int]] = []
    pieces = ChunkFiles.pieces

    def watched(self: ChunkFiles, chunk, buffers):  # type: ignore[no-untyped-def]
        files.append((chunk.panel.source, *chunk.place))
        return pieces(self, chunk, buffers)

    monkeypatch.setattr(ChunkFiles, "pieces", watched)
    # Chunks that hold something on or above the diagonal.
    wanted = [
        (panel.source, row, column)
        for panel in made.store.layout.panels
        if panel.kind == "panels"
        for row in range(-(-panel.rows // panel.row_chunk))
        for column in range(-(-panel.columns // panel.column_chunk))
        if (column + 1) * panel.column_chunk > row * panel.row_chunk
    ]
    for cache_bytes, products in ((0, 2), (1 << 30, 1)):
        files.clear()
        operator = StoreOperator(PanelReader(made.store, "hessian"), cache_bytes)
        for _ in range(2):
            operator.matmat(np.ones((operator.size, 4)))
        assert sorted(files) == sorted(wanted * products)
    assert not reads
    for question in (HessianStore(made.store).dense, HessianStore(made.store).blocks):
        reads.clear()
        question()
        assert sorted((source, rows.start) for source, rows, _ in reads) == sorted(expected)
    reads.clear()
    HessianStore(made.store).dask().compute(scheduler="sync")
    assert len(set(reads)) == len(reads)


def test_scipy_takes_the_operator(made: Made) -> None:
    store = HessianStore(made.store)
    values = np.linalg.eigvalsh(made.dense["ggn"])
    found = eigsh(store.operator("ggn"), k=2, which="LA", v0=np.ones(store.numel))[0]
    np.testing.assert_allclose(np.sort(found), values[-2:], atol=1e-9)


@pytest.mark.parametrize("part", PARTS)
def test_norms_and_traces(made: Made, part: Part) -> None:
    store = HessianStore(made.store)
    table = store.blocks(part)
    places = spans(tuple(Shape(p.name, p.numel, ()) for p in store.parameters))
    wanted = np.array([[np.linalg.norm(made.dense[part][r, c]) for c in places.values()] for r in places.values()])
    np.testing.assert_allclose(table.matrix(), wanted, rtol=1e-12)
    np.testing.assert_allclose(table.frobenius, np.linalg.norm(made.dense[part]), rtol=1e-12)
    np.testing.assert_allclose(table.trace, np.trace(made.dense[part]), atol=1e-10)
    rows = table.rows()
    assert len(rows) == len(places) * (len(places) + 1) // 2
    assert [row.norm for row in rows] == sorted((row.norm for row in rows), reverse=True)
    for row in rows:
        if row.a == row.b:
            np.testing.assert_allclose(row.trace, np.trace(made.dense[part][places[row.a], places[row.a]]), atol=1e-10)
        else:
            assert np.isnan(row.trace)


def test_unknown_names_are_refused_with_near_ones(made: Made) -> None:
    with pytest.raises(UnknownNameError, match=r"no parameter 'lsot'.*lost"):
        HessianStore(made.store).block("lsot", "lost")


def test_a_part_that_is_not_stored_is_refused(tmp_path: Path) -> None:
    store = HessianStore(make_store(tmp_path / "run.zarr", PLAIN, parts=("hessian",)).store)
    for part in ("ggn", "residual"):
        with pytest.raises(StoreError, match=f"holds hessian, not '{part}'"):
            store.block("w", "w", part)


def test_a_dense_matrix_beyond_memory_is_refused_with_its_size(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 1000

    monkeypatch.setattr("disthess.reduce.hessian_store.psutil.virtual_memory", Memory)
    with pytest.raises(StoreError, match="GB"):
        HessianStore(made.store).dense()


def test_missing_tiles_are_refused_and_never_read_as_numbers(tmp_path: Path) -> None:
    whole = make_layout(PLAIN, Chunks(), ("hessian", "ggn"))
    lost = next(tile.index for tile in whole.tiles if tile.source == "w" and tile.span.start == 8)
    made = make_store(tmp_path / "run.zarr", PLAIN, skip=[lost])
    store = HessianStore(made.store)
    assert store.missing_tiles() == (lost,)
    np.testing.assert_allclose(store.block("b", "v"), made.dense["hessian"][:5, 30:], atol=1e-12)
    for a, b in (("w", "v"), ("v", "w"), ("w", "w"), ("b", "w")):
        for lazy in (False, True):
            with pytest.raises(
                StoreError, match=rf"1 of 3 tiles .* \(1 of {len(whole.tiles)} in all\). Run the same again"
            ):
                store.block(a, b, lazy=lazy)
    for question in (store.dense, store.dask, store.symmetric_operator, store.blocks):
        with pytest.raises(StoreError, match="Run the same again"):
            question()


def test_float32_stores_multiply_in_float64(tmp_path: Path) -> None:
    made = make_store(tmp_path / "run.zarr", PLAIN, dtype="float32")
    store = HessianStore(made.store)
    dense = store.dense()
    assert dense.dtype == np.float32
    vectors = np.random.default_rng(0).standard_normal((store.numel, 2))
    np.testing.assert_allclose(
        store.symmetric_operator().matmat(vectors), dense.astype(np.float64) @ vectors, atol=1e-12
    )
