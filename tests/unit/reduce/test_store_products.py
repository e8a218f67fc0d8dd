"""Products from chunk files: the same bits however many threads, cached or not; float32 within its bound; damage refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from random_store import PLAIN, TIED, Chunks, Made, Shape, make_store

from disthess.errors import StoreError
from disthess.reduce import chunks as chunk_files
from disthess.reduce import products
from disthess.reduce.arrays import PanelReader
from disthess.reduce.chunks import ChunkFiles, aligned, needed_chunks
from disthess.reduce.hessian_store import HessianStore
from disthess.reduce.operator import StoreOperator
from disthess.reduce.shared import reduce_shared
from disthess.types import DType, Part

WIDE = (Shape("b", 37, (2,)), Shape("w", 301, (0,)), Shape("lost", 3, ()), Shape("v", 160, (1,)))
GEOMETRIES = {
    "ragged": Chunks(rows=50, columns=77, tile_chunks=2),
    "narrow": Chunks(rows=150, columns=20, tile_chunks=1),
    "flat": Chunks(rows=7, columns=300, tile_chunks=3),
}


def stored(place: Path, dtype: str, geometry: str = "ragged") -> Made:
    return make_store(place / "run.zarr", WIDE, GEOMETRIES[geometry], dtype=dtype)


def block_of(size: int, columns: int) -> np.ndarray:
    return np.random.default_rng(4).standard_normal((size, columns))


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("columns", [1, 8, 70])
def test_the_bits_depend_neither_on_threads_nor_on_the_cache(
    tmp_path: Path, geometry: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small pieces and blocks, so that chunks have several of both.
    monkeypatch.setattr(chunk_files, "PIECE_ROWS", 16)
    monkeypatch.setattr(chunk_files, "PIECE_BYTES", 1)
    monkeypatch.setattr(products, "BLOCK_PRODUCTS", 1 << 12)
    reader = PanelReader(stored(tmp_path, "float32", geometry).store, "residual")
    vectors = block_of(reader.store.layout.numel, columns)
    for multiply in ("float32", "float64"):
        first = StoreOperator(reader, 0, multiply=multiply, threads=1).matmat(vectors)  # type: ignore[arg-type]
        for threads, cache in itertools.product((1, 2, 5), (0, 1 << 30)):
            operator = StoreOperator(reader, cache, multiply=multiply, threads=threads)  # type: ignore[arg-type]
            for _ in range(2):
                assert operator.matmat(vectors).tobytes() == first.tobytes()


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("part", ["hessian", "ggn", "residual"])
def test_float64_products_are_those_of_the_dense_matrix(tmp_path: Path, geometry: str, part: Part) -> None:
    made = stored(tmp_path, "float64", geometry)
    vectors = block_of(made.store.layout.numel, 40)
    # A float64 store is multiplied in float64, whatever is asked for.
    for multiply in ("float64", "float32"):
        found = StoreOperator(PanelReader(made.store, part), 0, multiply=multiply).matmat(vectors)  # type: ignore[arg-type]
        np.testing.assert_allclose(found, made.dense[part] @ vectors, atol=1e-11)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_float32_products_are_within_the_bound_that_is_stated(tmp_path: Path, geometry: str) -> None:
    store = HessianStore(stored(tmp_path, "float32", geometry).store)
    vectors = block_of(store.numel, 8)
    exact = store.symmetric_operator().matmat(vectors)
    error = np.linalg.norm(store.symmetric_operator(multiply="float32").matmat(vectors) - exact, axis=0)
    scale = store.blocks().frobenius / np.sqrt(store.numel) * np.linalg.norm(vectors, axis=0)
    assert (error < 5e-7 * scale).all()
    assert (error > 1e-9 * scale).all()  # else nothing was multiplied in float32


@pytest.mark.parametrize("factor", [1e-60, 1e60])
def test_float32_products_of_vectors_beyond_float32(tmp_path: Path, factor: float) -> None:
    store = HessianStore(stored(tmp_path, "float32").store)
    vectors = block_of(store.numel, 3)
    operator = store.symmetric_operator(multiply="float32")
    wanted = factor * operator.matmat(vectors)
    found = operator.matmat(factor * vectors)
    error = np.linalg.norm(found - wanted, axis=0)
    assert (error < 1e-6 * np.linalg.norm(wanted, axis=0)).all()
    mixed = operator.matmat(np.concatenate([vectors * factor, np.zeros((store.numel, 1))], axis=1))
    assert not mixed[:, -1].any()


@pytest.mark.parametrize("multiply", ["float32", "float64"])
def test_a_vector_that_is_not_finite_gives_one_that_is_not(tmp_path: Path, multiply: DType) -> None:
    store = HessianStore(stored(tmp_path, "float32").store)
    vectors = block_of(store.numel, 2)
    vectors[5, 1] = np.nan
    found = store.symmetric_operator(multiply=multiply).matmat(vectors)
    assert np.isfinite(found[:, 0]).all()
    assert np.isnan(found[:, 1]).any()


def test_no_vectors_have_no_product(tmp_path: Path) -> None:
    store = HessianStore(stored(tmp_path, "float32").store)
    assert store.symmetric_operator().matmat(np.zeros((store.numel, 0))).shape == (store.numel, 0)


def test_what_is_stored_below_the_diagonal_is_not_used(tmp_path: Path) -> None:
    made = stored(tmp_path, "float64")
    panel = next(panel for panel in made.store.layout.panels if panel.source == "w")
    array = made.store.array(panel, "hessian")
    rows, columns = panel.row_chunk, panel.column_chunk
    for start in range(0, panel.rows, rows):
        stop, first = min(start + rows, panel.rows), start // columns * columns
        values = array[start:stop, first:]
        down, across = np.arange(start, stop)[:, None], np.arange(first, panel.columns)
        array[start:stop, first:] = np.where(across < down, np.nan, values)
    vectors = block_of(made.store.layout.numel, 2)
    found = StoreOperator(PanelReader(made.store, "hessian"), 0).matmat(vectors)
    np.testing.assert_allclose(found, made.dense["hessian"] @ vectors, atol=1e-11)


@pytest.mark.parametrize("damage", ["flipped byte", "flipped checksum", "cut short", "longer", "gone"])
@pytest.mark.parametrize("where", ["first", "last"])
def test_a_damaged_chunk_is_an_error_that_names_it(tmp_path: Path, damage: str, where: str) -> None:
    made = make_store(tmp_path / "run.zarr", PLAIN)
    reader = PanelReader(made.store, "ggn")
    chunk = needed_chunks(reader)[0 if where == "first" else -1]
    file = Path(made.store.path) / chunk.panel.path("ggn") / "c" / str(chunk.place[0]) / str(chunk.place[1])
    data = bytearray(file.read_bytes())
    if damage == "flipped byte":
        data[9] ^= 4
    elif damage == "flipped checksum":
        data[-1] ^= 4
    elif damage == "cut short":
        del data[-3:]
    elif damage == "longer":
        data += b"more"
    file.unlink()
    if damage != "gone":
        file.write_bytes(data)
    for cache in (0, 1 << 30):
        operator = StoreOperator(reader, cache, threads=2)
        for _ in range(2):
            with pytest.raises(StoreError, match=rf"Chunk panels/ggn/{chunk.panel.index}/{chunk.place[0]}/"):
                operator.matmat(np.ones((operator.size, 2)))
    # The other part's chunks are whole.
    StoreOperator(PanelReader(made.store, "hessian"), 0).matmat(np.ones((made.store.layout.numel, 1)))


def test_summed_panels_multiply_by_their_own_chunks(tmp_path: Path) -> None:
    made = make_store(tmp_path / "run.zarr", TIED)
    reduce_shared(made.store)
    made.store.mark_reduced()
    vectors = block_of(made.store.layout.numel, 3)
    for part in ("hessian", "residual"):
        found = StoreOperator(PanelReader(made.store, part), 0, threads=3).matmat(vectors)  # type: ignore[arg-type]
        np.testing.assert_allclose(found, made.dense[part] @ vectors, atol=1e-11)  # type: ignore[index]


def test_chunks_are_kept_in_the_dtype_of_multiplication_and_only_if_they_fit(tmp_path: Path) -> None:
    reader = PanelReader(stored(tmp_path, "float32").store, "hessian")
    single, double = (StoreOperator(reader, 0, multiply=m).cached_bytes for m in ("float32", "float64"))  # type: ignore[arg-type]
    assert double == 2 * single
    opened: list[object] = []
    pieces = ChunkFiles.pieces

    def watched(self, chunk, buffers):  # type: ignore[no-untyped-def]
        opened.append(chunk)
        return pieces(self, chunk, buffers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChunkFiles, "pieces", watched)
        for room, passes in ((single - 1, 2), (single, 1)):
            opened.clear()
            operator = StoreOperator(reader, room, multiply="float32")
            for _ in range(2):
                operator.matmat(np.ones((operator.size, 1)))
            assert len(opened) == passes * len(needed_chunks(reader))


def test_buffers_start_at_a_page() -> None:
    for shape in ((1, 3), (5, 1000)):
        values = aligned(shape, np.dtype("float32"))
        assert values.ctypes.data % chunk_files.ALIGNMENT == 0
        assert values.shape == shape
        assert values.flags.writeable
