"""What every store must do, whatever it lies on: a class that a store's test file inherits.

A subclass gives ``place`` (a fixture: where a store may be made) and, where bytes can be reached, ``flip``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from disthess.errors import StoreError
from disthess.store.layout import Layout, PanelSpec, ParameterSpec, Tile, TileRecord
from disthess.store.store import Store
from disthess.types import Part, Span


def make_layout(row_chunk: int = 4, column_chunk: int = 5, tile_rows: int = 8, dtype: str = "float64") -> Layout:
    """Parameters ``w`` (18 entries) and ``b`` (3), with tiles of ``tile_rows`` rows; ``z`` is not reached."""
    parameters = (
        ParameterSpec("b", (), (3,), 1, ("b@0",)),
        ParameterSpec("w", ("v",), (6, 3), 0, ("w@0",)),
        ParameterSpec("z", (), (2,), 2, ()),
    )
    first = PanelSpec("panels", 0, "w", 18, (("w", 18), ("b", 3)), row_chunk, column_chunk, True)
    second = PanelSpec("panels", 1, "b", 3, (("b", 3),), 3, 3, True)
    spans = [("w", Span(start, min(start + tile_rows, 18))) for start in range(0, 18, tile_rows)] + [("b", Span(0, 3))]
    tiles = tuple(Tile(i, source, span, i, i % 2, 100 + i, 8, 999) for i, (source, span) in enumerate(spans))
    outputs = (("w", (("panels", 0),)), ("b", (("panels", 1),)))
    return Layout(parameters, (first, second), outputs, tiles, ("hessian", "ggn"), dtype)  # type: ignore[arg-type]


def tile_arrays(layout: Layout, tile: Tile, seed: int = 0) -> dict[Part, list[np.ndarray]]:
    rng = np.random.default_rng([seed, tile.index])
    shapes = [
        (tile.span.size, panel.columns - panel.first_column(tile.span.start)) for panel in layout.panels_of(tile.source)
    ]
    return {part: [rng.normal(size=shape).astype(layout.dtype) for shape in shapes] for part in layout.parts}


def write(store: Store, *numbers: int, mark: bool = True) -> None:
    for number in numbers:
        tile = store.layout.tiles[number]
        checksum, written = store.write_tile(tile, tile_arrays(store.layout, tile))
        if mark:
            store.mark([TileRecord(number, checksum, 0.5, written, 7, 1)])


class StoreSuite:
    """Claims that hold for every store."""

    layout = make_layout()

    def flip(self, place: Path, array: str, chunk: str) -> None:
        """Change one byte of a chunk behind the store's back."""
        raise NotImplementedError

    @pytest.fixture
    def store(self, place: Path) -> Store:
        return Store.create(place, self.layout, {"fingerprint": {"loss": "mse"}, "odd": float("inf")})

    def test_what_is_written_is_read_back_bit_for_bit(self, store: Store, place: Path) -> None:
        write(store, *range(len(self.layout.tiles)))
        opened = Store.open(place)
        for tile in self.layout.tiles:
            wanted = tile_arrays(self.layout, tile)
            for part in self.layout.parts:
                for panel, values in zip(self.layout.panels_of(tile.source), wanted[part]):
                    columns = Span(panel.first_column(tile.span.start), panel.columns)
                    got = opened.read(panel, part, tile.span, columns)
                    assert got.dtype == values.dtype
                    assert got.tobytes() == values.tobytes()

    def test_a_part_of_a_region_is_that_part(self, store: Store) -> None:
        write(store, 1)
        panel = self.layout.panels[0]
        wanted = tile_arrays(self.layout, self.layout.tiles[1])["ggn"][0]
        got = store.read(panel, "ggn", Span(9, 13), Span(8, 20))
        np.testing.assert_array_equal(got, wanted[1:5, 8 - panel.first_column(8) : 20 - panel.first_column(8)])

    def test_attributes_and_layout_survive(self, store: Store, place: Path) -> None:
        store.set_attributes(versions={"numpy": "2"})
        opened = Store.open(place)
        assert opened.attributes["fingerprint"] == {"loss": "mse"}
        assert opened.attributes["odd"] == float("inf")
        assert opened.attributes["versions"] == {"numpy": "2"}
        assert opened.attributes["schema"] == 1
        assert opened.layout.parameters == self.layout.parameters
        assert opened.layout.panels == self.layout.panels
        assert opened.layout.outputs == self.layout.outputs
        assert [(t.source, t.span, t.flops, t.owner, t.memory_bytes) for t in opened.layout.tiles] == [
            (t.source, t.span, t.flops, 0, 0) for t in self.layout.tiles
        ]

    def test_data_without_a_ledger_row_is_missing(self, store: Store, place: Path) -> None:
        write(store, 0)
        write(store, 1, mark=False)
        assert Store.open(place).missing_tiles() == tuple(range(1, len(self.layout.tiles)))
        write(Store.open(place, writable=True), 1)
        assert Store.open(place).done()[1]

    def test_a_zero_that_was_computed_is_no_missing_number(self, store: Store) -> None:
        tile = self.layout.tiles[0]
        zeros = {
            part: [np.zeros_like(array) for array in arrays] for part, arrays in tile_arrays(self.layout, tile).items()
        }
        store.write_tile(tile, zeros)
        panel = self.layout.panels[0]
        assert not store.read(panel, "hessian", tile.span, Span(0, panel.columns)).any()
        assert np.isnan(store.array(panel, "hessian")[8:, :]).all()
        with pytest.raises(StoreError, match="is not there"):
            store.read(panel, "hessian", Span(8, 9), Span(5, 6))

    def test_records_come_back(self, store: Store) -> None:
        write(store, 2, 0)
        records = store.records()
        assert [record.tile for record in records] == [0, 2]
        assert {(record.seconds, record.peak_bytes, record.worker) for record in records} == {(0.5, 7, 1)}
        assert records[0].checksum != records[1].checksum

    def test_quarantine_counts_as_missing_until_done(self, store: Store, place: Path) -> None:
        store.quarantine(1, "does not work")
        opened = Store.open(place)
        assert opened.quarantined() == {1: "does not work"}
        assert 1 in opened.missing_tiles()
        write(store, 1)
        assert opened.quarantined() == {}
        assert 1 not in opened.missing_tiles()

    def test_a_flipped_byte_is_found_and_repaired(self, store: Store, place: Path) -> None:
        write(store, *range(len(self.layout.tiles)))
        store.write_loss(1.0)
        store.write_gradient(np.zeros(23))
        store.mark_reduced()
        store.write_result("certificate/ggn", {"errors": np.zeros(2)}, {})
        store.write_result("spectrum/a", {"values": np.zeros(2)}, {})
        self.flip(place, "panels/ggn/0", "2/3")
        with pytest.raises(StoreError, match=r"panels/ggn/0/2/3.*tile 1.*--repair"):
            store.read(self.layout.panels[0], "ggn", Span(8, 16), Span(5, 21))
        report = Store.open(place).verify()
        assert [entry.tile for entry in report.damaged] == [1]
        assert not report.repaired
        assert store.missing_tiles() == ()
        report = store.verify(repair=True)
        assert report.repaired
        assert store.missing_tiles() == (1,)
        assert not store.is_reduced()
        assert store.result_names() == ("spectrum/a",)
        write(store, 1)
        assert store.verify().ok

    def test_other_bytes_with_a_right_crc_are_found_by_the_ledger(self, store: Store) -> None:
        write(store, *range(len(self.layout.tiles)))
        tile = self.layout.tiles[0]
        store.write_tile(tile, tile_arrays(self.layout, tile, seed=1))
        report = store.verify()
        assert [entry.tile for entry in report.damaged] == [0]
        assert "the ledger says" in report.damaged[0].message

    def test_verify_tells_progress_and_counts_what_is_missing(self, store: Store) -> None:
        write(store, 0, 2)
        seen: list[tuple[int, int]] = []
        report = store.verify(progress=lambda done, total: seen.append((done, total)))
        assert seen == [(1, 2), (2, 2)]
        assert (report.checked, report.missing, report.ok) == (2, len(self.layout.tiles) - 2, True)

    def test_results_are_replaced_as_a_whole(self, store: Store, place: Path) -> None:
        store.write_result("spectrum/both-10", {"values": np.arange(4.0), "old": np.ones(2)}, {"k": 10, "tol": np.inf})
        store.write_result("spectrum/both-10", {"values": np.zeros((0, 3)), "one": np.float32(2)}, {"k": np.int64(11)})
        arrays, attributes = Store.open(place).read_result("spectrum/both-10")
        assert set(arrays) == {"values", "one"}
        assert arrays["values"].shape == (0, 3)
        assert arrays["one"].dtype == np.float32
        assert attributes == {"k": 11}
        assert store.result_names() == ("spectrum/both-10",)
        assert not store.has_result("spectrum")
        with pytest.raises(StoreError, match="has no result"):
            store.read_result("lowrank/x")

    @pytest.mark.parametrize("name", ["panels/x", "../x", "a//b", ".x", "spectrum/both/inner"])
    def test_bad_result_names_are_refused(self, store: Store, name: str) -> None:
        store.write_result("spectrum/both", {"values": np.arange(4.0)}, {})
        with pytest.raises(StoreError):
            store.write_result(name, {"values": np.arange(4.0)}, {})

    def test_gradient_and_loss_are_refused_until_written(self, store: Store, place: Path) -> None:
        with pytest.raises(StoreError, match="not been written"):
            store.loss()
        with pytest.raises(StoreError, match="not been written"):
            store.gradient()
        store.write_loss(2.5)
        store.write_gradient(np.arange(23.0))
        assert Store.open(place).loss() == 2.5
        np.testing.assert_array_equal(Store.open(place).gradient(), np.arange(23.0))

    def test_rows_of_a_reduced_panel_are_whole_chunks(self, store: Store) -> None:
        panel = self.layout.panels[0]
        store.write_rows(panel, "hessian", 8, np.ones((10, 21 - panel.first_column(8))))
        assert (store.read(panel, "hessian", Span(8, 18), Span(5, 21)) == 1).all()
        for start, rows in ((2, 4), (0, 3), (16, 4)):
            with pytest.raises(ValueError, match="whole chunks"):
                store.write_rows(panel, "hessian", start, np.ones((rows, 21 - panel.first_column(start))))

    def test_reading_only_means_reading_only(self, store: Store, place: Path) -> None:
        opened = Store.open(place)
        with pytest.raises(StoreError, match="reading only"):
            write(opened, 0)
        with pytest.raises(StoreError, match="reading only"):
            opened.write_result("a", {}, {})
        with pytest.raises(StoreError, match="reading only"):
            opened.verify(repair=True)

    def test_wrong_tiles_are_refused(self, store: Store) -> None:
        tile = self.layout.tiles[0]
        good = tile_arrays(self.layout, tile)
        with pytest.raises(ValueError, match="needs the parts"):
            store.write_tile(tile, {"hessian": good["hessian"]})
        with pytest.raises(ValueError, match="shapes"):
            store.write_tile(tile, {part: [arrays[0][:, 1:]] for part, arrays in good.items()})
        with pytest.raises(ValueError, match="float32"):
            store.write_tile(tile, {part: [arrays[0].astype("float32")] for part, arrays in good.items()})
        with pytest.raises(StoreError, match="not 'residual'"):
            store.array(self.layout.panels[0], "residual")
