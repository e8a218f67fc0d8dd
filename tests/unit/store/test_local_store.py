"""The store on a local file system: the conformance suite, and what only files can go wrong with."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import pickle
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from zarr.storage import LocalStore

from disthess.errors import StoreError
from disthess.store.check_layout import check_layout
from disthess.store.disk import check_disk, layout_disk_bytes, panel_disk_bytes
from disthess.store.lock import StoreLock
from disthess.store.store import Store
from disthess.types import Span


def _load_suite() -> Any:
    path = Path(__file__).parents[2] / "conformance" / "store_suite.py"
    spec = importlib.util.spec_from_file_location("store_suite", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["store_suite"] = module
    spec.loader.exec_module(module)
    return module


suite = _load_suite()
make_layout, write, tile_arrays = suite.make_layout, suite.write, suite.tile_arrays


class TestLocalStore(suite.StoreSuite):  # type: ignore[misc]
    @pytest.fixture
    def place(self, tmp_path: Path) -> Path:
        return tmp_path / "deep" / "run.zarr"

    def flip(self, place: Path, array: str, chunk: str) -> None:
        file = place / array / "c" / chunk
        raw = bytearray(file.read_bytes())
        raw[11] ^= 4
        file.write_bytes(raw)

    def test_attributes_are_written_at_once(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        """A writer that dies leaves what they were before or after, not some of each without their seal."""
        written: list[str] = []
        put = LocalStore.set

        async def count(self: LocalStore, key: str, value: Any) -> None:
            written.append(key)
            await put(self, key, value)

        monkeypatch.setattr(LocalStore, "set", count)
        store.set_attributes(versions={"numpy": "2"}, title="other", samples=3)
        assert written == ["zarr.json"]
        written.clear()
        store.mark_reduced()
        assert written == ["ledger/zarr.json"]


class TestLocalStoreInSingles(TestLocalStore):
    """Other chunks, one row chunk per tile, float32."""

    layout = make_layout(row_chunk=8, column_chunk=5, dtype="float32")

    def flip(self, place: Path, array: str, chunk: str) -> None:
        super().flip(place, array, chunk.replace("2/3", "1/3"))

    def test_a_flipped_byte_is_found_and_repaired(self, store: Store, place: Path) -> None:
        write(store, *range(len(self.layout.tiles)))
        self.flip(place, "panels/ggn/0", "2/3")
        assert [entry.tile for entry in store.verify(repair=True).damaged] == [1]
        assert store.missing_tiles() == (1,)

    def test_rows_of_a_reduced_panel_are_whole_chunks(self, store: Store) -> None:
        with pytest.raises(ValueError, match="columns of float32"):
            store.write_rows(self.layout.panels[0], "hessian", 0, np.ones((8, 21)))

    def test_wrong_tiles_are_refused(self, store: Store) -> None:
        tile = self.layout.tiles[0]
        wrong = {part: [arrays[0].astype("float64")] for part, arrays in tile_arrays(self.layout, tile).items()}
        with pytest.raises(ValueError, match="float64"):
            store.write_tile(tile, wrong)


def test_chunks_are_raw_numbers_and_a_crc(tmp_path: Path) -> None:
    layout = make_layout()
    store = Store.create(tmp_path / "s.zarr", layout, {})
    write(store, 0)
    raw = (tmp_path / "s.zarr/panels/hessian/0/c/0/1").read_bytes()
    assert len(raw) == 4 * 5 * 8 + 4
    values = np.frombuffer(raw[:-4], "<f8").reshape(4, 5)
    np.testing.assert_array_equal(values, tile_arrays(layout, layout.tiles[0])["hessian"][0][:4, 5:10])


def test_projected_bytes_are_those_on_disk(tmp_path: Path) -> None:
    layout = make_layout(row_chunk=8)
    store = Store.create(tmp_path / "s.zarr", layout, {})
    write(store, *range(len(layout.tiles)))
    chunks = sum(file.stat().st_size for file in (tmp_path / "s.zarr/panels").rglob("c/*/*"))
    assert chunks == layout_disk_bytes(layout)
    assert store.nbytes_on_disk() > chunks
    assert panel_disk_bytes(layout.panels[1], 8) == 3 * 3 * 8 + 4


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda place: None, "no store at"),
        (lambda place: place.write_text("x"), "is a file"),
        (lambda place: place.mkdir(), "no zarr.json"),
        (lambda place: (place.mkdir(), (place / "zarr.json").write_text("{")), "damaged"),
        (lambda place: _foreign(place, {}), "not one that disthess has written"),
        (lambda place: _foreign(place, {"schema": 99, "layout": {}}), "schema 99"),
    ],
)
def test_what_is_no_store_is_said(tmp_path: Path, prepare: Any, message: str) -> None:
    place = tmp_path / "it"
    prepare(place)
    with pytest.raises(StoreError, match=message):
        Store.open(place)


def _foreign(place: Path, attributes: dict[str, Any]) -> None:
    place.mkdir()
    (place / "zarr.json").write_text(
        json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}), encoding="utf-8"
    )


@pytest.mark.parametrize(
    "url", ["memory://run.zarr", "file:///tmp/run.zarr", "s3://bucket", "https://example.org/run.zarr"]
)
def test_urls_that_cannot_hold_a_store_are_refused(url: str) -> None:
    with pytest.raises(StoreError, match=r"cannot hold a store.*s3://bucket/runs"):
        Store.open(url)


def test_a_store_travels_without_the_lease_it_is_held_by(tmp_path: Path) -> None:
    with StoreLock(tmp_path / "s.zarr") as lease:
        store = Store.create(tmp_path / "s.zarr", make_layout(), {})
        store.hold(lease)
        write(store, 0)
        there = pickle.loads(pickle.dumps(store))
    tile = store.layout.tiles[0]
    got = there.read(store.layout.panels[0], "hessian", tile.span, Span(0, 21))
    np.testing.assert_array_equal(got, tile_arrays(store.layout, tile)["hessian"][0])
    with pytest.raises(StoreError, match="not held"):
        write(store, 1)
    store.hold(None)
    write(store, 1)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    layout = make_layout()
    Store.create(tmp_path / "s.zarr", layout, {})
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(StoreError, match="exists already; open it"):
        Store.create(tmp_path / "s.zarr", layout, {})
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="is no store"):
        Store.create(tmp_path / "folder", layout, {})
    assert sorted(path for path in tmp_path.rglob("*")) == sorted([*before, tmp_path / "folder"])


def test_a_store_is_never_half_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("disthess.store.make.create_ledger", full)
    with pytest.raises(StoreError, match="No space is left"):
        Store.create(tmp_path / "s.zarr", make_layout(), {})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_while_writing_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.create(tmp_path / "s.zarr", make_layout(), {})

    def full(*_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("zarr.storage._local._put", full)
    with pytest.raises(StoreError, match=r"No space is left.*tile 0 \(2.69 kB\).*run again"):
        write(store, 0)
    monkeypatch.undo()
    assert 0 in store.missing_tiles()
    write(store, 0)
    assert 0 not in store.missing_tiles()


def test_too_little_disk_is_refused_with_sizes(tmp_path: Path) -> None:
    check_disk(tmp_path / "not" / "there", 10)
    with pytest.raises(StoreError, match=r"needs 1.15 EB .*has .* left"):
        check_disk(tmp_path, 2**60)


@pytest.mark.parametrize("change", ["overlap", "gap", "not whole", "two writers", "no writer"])
def test_layouts_that_would_lose_data_are_refused(tmp_path: Path, change: str) -> None:
    layout = make_layout()
    tiles = list(layout.tiles)
    outputs = layout.outputs
    if change == "overlap":
        tiles[1] = replace(tiles[1], span=Span(4, 16))
    elif change == "gap":
        tiles = [replace(tile, index=i) for i, tile in enumerate(tiles[:1] + tiles[2:])]
    elif change == "not whole":
        tiles[0], tiles[1] = replace(tiles[0], span=Span(0, 6)), replace(tiles[1], span=Span(6, 16))
    elif change == "two writers":
        outputs = (outputs[0], ("b", (("panels", 1), ("panels", 1))))
    else:
        outputs = (outputs[0], ("b", ()))
    with pytest.raises(ValueError, match=r"tile|writer"):
        Store.create(tmp_path / "s.zarr", replace(layout, tiles=tuple(tiles), outputs=outputs), {})
    check_layout(layout)


_WRITER = """
import sys
sys.path.insert(0, {folder!r})
import store_suite
from disthess.store.lock import StoreLock
from disthess.store.store import Store
store = Store.open({place!r}, writable=True)
store_suite.write(store, 0)
store_suite.write(store, 1, mark=False)
print("written", flush=True)
import time
time.sleep(60)
"""


def test_a_killed_run_leaves_a_store_that_resumes(tmp_path: Path) -> None:
    place = tmp_path / "s.zarr"
    layout = make_layout()
    Store.create(place, layout, {})
    folder = str(Path(suite.__file__).parent)
    code = _WRITER.format(folder=folder, place=str(place))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    (place / "panels/ggn/0/c/0/0.abc.partial").write_bytes(b"half")
    store = Store.open(place, writable=True)
    assert store.missing_tiles() == tuple(range(1, len(layout.tiles)))
    assert store.verify(repair=True).ok
    assert not list(place.rglob("*.partial"))
    write(store, *store.missing_tiles())
    other = Store.create(tmp_path / "t.zarr", layout, {})
    write(other, *reversed(range(len(layout.tiles))))
    names = [path.relative_to(place) for path in (place / "panels").rglob("*") if path.is_file()]
    assert len(names) > 20
    assert all((place / name).read_bytes() == (tmp_path / "t.zarr" / name).read_bytes() for name in names)


def test_handles_write_tiles_at_the_same_time(tmp_path: Path) -> None:
    layout = make_layout(row_chunk=2, tile_rows=2)
    store = Store.create(tmp_path / "s.zarr", layout, {})
    with ThreadPoolExecutor(4) as pool:
        handles = [Store.open(store.path, writable=True) for _ in layout.tiles]
        list(pool.map(lambda number: write(handles[number], number, mark=False), range(len(layout.tiles))))
    for tile in layout.tiles:
        panel = layout.panels_of(tile.source)[0]
        got = store.read(panel, "hessian", tile.span, Span(panel.first_column(tile.span.start), panel.columns))
        np.testing.assert_array_equal(got, tile_arrays(layout, tile)["hessian"][0])


def test_a_store_that_may_not_be_written_says_so(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    Store.create(tmp_path / "s.zarr", make_layout(), {})
    (tmp_path / "s.zarr").chmod(0o555)
    with pytest.raises(StoreError, match="cannot be written"):
        Store.open(tmp_path / "s.zarr", writable=True)
