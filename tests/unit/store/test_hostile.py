"""A store made to do harm gets an error of ours, at once and without memory; so does one whose JSON was changed at random."""

from __future__ import annotations

import contextlib
import copy
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from disthess.errors import DisthessError, StoreError
from disthess.store.encode import layout_to_json
from disthess.store.hostile import trusted_layout
from disthess.store.layout import Layout, PanelSpec, ParameterSpec, Tile, TileRecord
from disthess.store.ledger import attributes_trouble
from disthess.store.store import Store
from disthess.types import Span


def make_layout() -> Layout:
    parameters = (
        ParameterSpec("../../b", (), (3,), 1, ("b@0",)),
        ParameterSpec("/w\x00", ("v" * 5000, "ü/∂"), (6, 3), 0, ("w@0",)),
        ParameterSpec("z", (), (2,), 2, ()),
    )
    first = PanelSpec("panels", 0, "/w\x00", 18, (("/w\x00", 18), ("../../b", 3)), 4, 5, True)
    second = PanelSpec("panels", 1, "../../b", 3, (("../../b", 3),), 3, 3, True)
    spans = [("/w\x00", Span(start, min(start + 8, 18))) for start in range(0, 18, 8)] + [("../../b", Span(0, 3))]
    tiles = tuple(Tile(i, source, span, i, 0, 100, 8, 0) for i, (source, span) in enumerate(spans))
    return Layout(
        parameters,
        (first, second),
        (("/w\x00", (("panels", 0),)), ("../../b", (("panels", 1),))),
        tiles,
        ("hessian",),
        "float64",
    )


def make_store(place: Path) -> Store:
    store = Store.create(place, make_layout(), {"fingerprint": {"loss": "mse"}, "sections": {"q": "w[0:2]"}})
    for tile in store.layout.tiles:
        panel = store.layout.panels_of(tile.source)[0]
        values = np.ones((tile.span.size, panel.columns - panel.first_column(tile.span.start)))
        checksum, written = store.write_tile(tile, {"hessian": [values]})
        store.mark([TileRecord(tile.index, checksum, 0.5, written, 7, 0)])
    store.write_loss(1.0)
    store.write_gradient(np.arange(23.0))
    store.write_result("spectrum/a", {"values": np.arange(3.0)}, {"k": 3})
    store.mark_reduced()
    return store


def use(place: Path) -> None:
    """What readers do with a store."""
    store = Store.open(place)
    _ = store.attributes, store.layout.numel
    store.missing_tiles(), store.records(), store.quarantined()
    for read in (store.gradient, store.loss, lambda: [store.read_result(name) for name in store.result_names()]):
        try:
            read()
        except StoreError:
            continue
    store.verify()


def test_names_never_become_paths(tmp_path: Path) -> None:
    """Panels are numbered: whatever a parameter is called, nothing lies outside the store."""
    place = tmp_path / "inner" / "s.zarr"
    store = make_store(place)
    assert store.verify().ok
    assert [p.name for p in store.layout.parameters] == ["../../b", "/w\x00", "z"]
    assert [path.name for path in tmp_path.iterdir()] == ["inner"]
    assert [path.name for path in (tmp_path / "inner").iterdir()] == ["s.zarr"]
    for name in ("../x", "/x", "a/../../x", "x\x00", "ü", "a" * 5000, "", ".", "spectrum/..", "panels/x"):
        with pytest.raises(StoreError):
            store.write_result(name, {"values": np.zeros(1)}, {})
        with pytest.raises(StoreError):
            store.write_result("spectrum/b", {name: np.zeros(1)}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["inner"]
    with pytest.raises(StoreError, match="zero byte"):
        Store.open("a\x00b")


def attributes() -> dict[str, Any]:
    layout = make_layout()
    return {"schema": 1, "dtype": "float64", "layout": json.loads(json.dumps(layout_to_json(layout)))}


def at(tree: Any, *keys: Any) -> Any:
    for key in keys:
        tree = tree[key]
    return tree


LIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "negative rows": lambda a: at(a, "layout", "panels", 0).update(rows=-1),
    "rows of a trillion": lambda a: at(a, "layout", "panels", 0).update(rows=10**12),
    "rows that are not the parameter's": lambda a: at(a, "layout", "panels", 0).update(rows=19),
    "rows as text": lambda a: at(a, "layout", "panels", 0).update(rows="18"),
    "rows as NaN": lambda a: at(a, "layout", "panels", 0).update(rows=float("nan")),
    "rows as a fraction": lambda a: at(a, "layout", "panels", 0).update(rows=18.0),
    "rows as true": lambda a: at(a, "layout", "panels", 1).update(rows=True),
    "an enormous number": lambda a: at(a, "layout", "panels", 0).update(rows=10**5000),
    "chunks of nothing": lambda a: at(a, "layout", "panels", 0).update(row_chunk=0),
    "chunks of everything": lambda a: at(a, "layout", "panels", 0).update(row_chunk=2**29, column_chunk=2**29),
    "a shape of a trillion": lambda a: at(a, "layout", "parameters", 2).update(shape=[10**6, 10**6]),
    "a shape of many axes": lambda a: at(a, "layout", "parameters", 2).update(shape=[2**32] * 1000),
    "a shape that is no list": lambda a: at(a, "layout", "parameters", 0).update(shape=3),
    "a negative size": lambda a: at(a, "layout", "parameters", 0).update(shape=[-3]),
    "names that are no text": lambda a: at(a, "layout", "parameters", 0).update(name=3),
    "two of one name": lambda a: at(a, "layout", "parameters", 0).update(name="z"),
    "ranks twice": lambda a: at(a, "layout", "parameters", 0).update(rank=0),
    "an infinite decay": lambda a: at(a, "layout", "parameters", 0).update(weight_decay=float("inf")),
    "panels that are no list": lambda a: a["layout"].update(panels={"a": 1}),
    "a kind that escapes": lambda a: at(a, "layout", "panels", 0).update(kind="../.."),
    "a part that escapes": lambda a: a["layout"].update(parts=["../../x"]),
    "a part twice": lambda a: a["layout"].update(parts=["hessian", "hessian"]),
    "an unknown dtype": lambda a: a["layout"].update(dtype="object"),
    "two dtypes": lambda a: a.update(dtype="float32"),
    "an output of nothing": lambda a: at(a, "layout", "outputs", 0).update(panels=[["panels", 9]]),
    "two writers": lambda a: at(a, "layout", "outputs", 1).update(panels=[["panels", 0]]),
    "a tile too many": lambda a: at(a, "layout", "tiles", "rows").append(at(a, "layout", "tiles", "rows", 0)),
    "a tile backwards": lambda a: at(a, "layout", "tiles", "rows", 0).__setitem__(slice(1, 3), [8, 0]),
    "a tile without a source": lambda a: at(a, "layout", "tiles", "rows", 0).__setitem__(0, "x"),
    "a tile of four values": lambda a: at(a, "layout", "tiles", "rows").__setitem__(0, [1, 2, 3, 4]),
    "a target that is not there": lambda a: at(a, "layout", "panels", 0, "targets").append(["q", 5]),
    "a target twice": lambda a: at(a, "layout", "panels", 0, "targets").append(["../../b", 3]),
    "no tiles": lambda a: a["layout"].pop("tiles"),
    "sections that are no texts": lambda a: a.update(sections={"q": 3}),
    "kinks that are none": lambda a: a.update(kinks=[{"node": 1}]),
    "samples of a trillion": lambda a: a["layout"].update(activation_samples=10**12),
}


@pytest.mark.parametrize("lie", LIES)
def test_layouts_that_cannot_be_are_refused_at_once(lie: str) -> None:
    value = attributes()
    trusted_layout(value, "s.zarr")
    LIES[lie](value)
    began = time.perf_counter()
    with pytest.raises(StoreError, match="cannot be trusted") as caught:
        trusted_layout(value, "s.zarr")
    assert time.perf_counter() - began < 2
    assert len(str(caught.value)) < 1000


def test_deep_nesting_is_refused() -> None:
    value: Any = attributes()
    inner: Any = []
    for _ in range(5000):
        inner = [inner]
    with pytest.raises(StoreError, match="nested"):
        trusted_layout({**value, "more": inner}, "s.zarr")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "damaged"),
        ('{"zarr_format": 3, "node_type": "group", "attributes": {"schema": 1, "layout": ' + "[" * 50_000, "damaged"),
        ('{"zarr_format": 3, "node_type": "group", "attributes": {"schema": -1, "layout": {}}}', "says no schema"),
    ],
)
def test_json_bombs_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "zarr.json").write_text(text)
    with pytest.raises(StoreError, match=message):
        Store.open(tmp_path)


def test_an_enormous_zarr_json_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "zarr.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(StoreError, match="are allowed"):
        Store.open(tmp_path)


@pytest.mark.parametrize(
    "array",
    [
        "panels/hessian/0",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gradient", "ledger/state", "spectrum/a/values")),
    ],
)
@pytest.mark.parametrize(
    "change",
    [
        {"shape": [10**11]},
        {"shape": [10**11, 10**11]},
        {"data_type": "string"},
        {"data_type": {"name": "null_terminated_bytes", "configuration": {"length_bytes": 2**31}}},
        {"codecs": [{"name": "bytes"}, {"name": "zstd"}]},
        {"codecs": [{"name": "numcodecs.pickle", "configuration": {}}]},
        {"codecs": []},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1]}}},
        {"node_type": "group"},
        {"zarr_format": 2},
        {"storage_transformers": [{"name": "x"}]},
    ],
)
def test_metadata_that_is_not_the_layouts_is_found(tmp_path: Path, array: str, change: dict[str, Any]) -> None:
    make_store(tmp_path / "s.zarr")
    file = tmp_path / "s.zarr" / array / "zarr.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    report = Store.open(tmp_path / "s.zarr").verify()
    assert any(array.split("/values")[0] in entry.where for entry in report.damaged)
    store = Store.open(tmp_path / "s.zarr", writable=True)
    store.verify(repair=True)
    assert store.verify().ok
    assert store.missing_tiles() == ()


_BOUNDED = """
import resource, sys
import disthess.store.store as s
from disthess.errors import StoreError
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    store = s.Store.open(sys.argv[1])
    store.gradient()
except StoreError as error:
    print("refused", str(error)[:100].replace(chr(10), " "))
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024
assert grown < 200, grown
"""


@pytest.mark.parametrize("claim", ["layout", "gradient"])
def test_claims_of_a_trillion_take_no_memory(tmp_path: Path, claim: str) -> None:
    make_store(tmp_path / "s.zarr")
    file = tmp_path / "s.zarr" / ("zarr.json" if claim == "layout" else "gradient/zarr.json")
    value = json.loads(file.read_text())
    if claim == "layout":
        value["attributes"]["layout"]["parameters"][2]["shape"] = [10**12]
    else:
        value.update(shape=[10**12])
        value["chunk_grid"]["configuration"]["chunk_shape"] = [10**12]
    file.write_text(json.dumps(value))
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _BOUNDED, str(tmp_path / "s.zarr")], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.startswith("refused"), done.stderr
    assert time.perf_counter() - began < 60


ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([-1, 0, 10**12, 10**30]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = tree.keys() if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    return [path, *(place for key in keys for place in places(tree[key], (*path, key)))]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("fuzz") / "s.zarr"
    make_store(place)
    return place


def _mutate(shared: Path, data: st.DataObject) -> None:
    files = sorted(shared.rglob("zarr.json"))
    # The root, where the layout is, as often as all others together.
    file = data.draw(st.sampled_from([shared / "zarr.json"] * len(files) + files))
    before = file.read_bytes()
    value = json.loads(before)
    place = data.draw(st.sampled_from(places(value)[1:]))
    parent = at(value, *place[:-1])
    if data.draw(st.booleans()):
        parent[place[-1]] = data.draw(ANY)
    else:
        del parent[place[-1]]
    try:
        file.write_text(json.dumps(value))
        with contextlib.suppress(DisthessError):
            use(shared)
    finally:
        file.write_bytes(before)


SETTINGS = {"deadline": 20_000, "suppress_health_check": list(HealthCheck), "database": None}


@settings(max_examples=20, **SETTINGS)  # type: ignore[arg-type]
@given(st.data())
def test_changed_json_raises_nothing_but_our_errors(shared: Path, data: st.DataObject) -> None:
    _mutate(shared, data)


@pytest.mark.slow
@settings(max_examples=1500, **SETTINGS)  # type: ignore[arg-type]
@given(st.data())
def test_changed_json_raises_nothing_but_our_errors_many_times(shared: Path, data: st.DataObject) -> None:
    _mutate(shared, data)


_LIMITED = """
import resource, sys
sys.path.insert(0, {folder!r})
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import test_hostile as t
from disthess.errors import StoreError
from disthess.store.store import Store
store = Store.open({place!r}, writable=True)
tile = store.layout.tiles[1]
panel = store.layout.panels_of(tile.source)[0]
values = t.np.ones((tile.span.size, panel.columns - panel.first_column(tile.span.start)))
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
try:
    store.write_tile(tile, {{"hessian": [values]}})
except StoreError as error:
    print(error)
"""


def test_a_limit_on_file_sizes_is_said_and_the_store_resumes(tmp_path: Path) -> None:
    """A real refusal of the kernel, as a quota or a full disk gives it."""
    store = make_store(tmp_path / "s.zarr")
    store.mark_missing([1])
    code = _LIMITED.format(folder=str(Path(__file__).parent), place=store.path)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=200)
    assert "No space is left" in done.stdout, done.stderr
    assert "run again, which resumes" in done.stdout
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    again = Store.open(store.path, writable=True)
    assert again.missing_tiles() == (1,)
    tile, panel = again.layout.tiles[1], again.layout.panels[0]
    values = np.ones((tile.span.size, panel.columns - panel.first_column(tile.span.start)))
    checksum, written = again.write_tile(tile, {"hessian": [values]})
    again.mark([TileRecord(1, checksum, 0.5, written, 7, 0)])
    assert again.verify().ok


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB, where this user may mount one."""
    place = tmp_path / "tiny"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_said_and_the_store_resumes(tiny: Path) -> None:
    store = make_store(tiny / "s.zarr")
    store.mark_missing([1])
    tile, panel = store.layout.tiles[1], store.layout.panels[0]
    before = {file: file.read_bytes() for file in (tiny / "s.zarr/panels").rglob("c/*/*")}
    for file in (tiny / "s.zarr" / panel.path("hessian") / "c").glob("[23]/*"):
        file.unlink()
    with contextlib.suppress(OSError), (tiny / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(b"x" * 512)
    values = np.ones((tile.span.size, panel.columns - panel.first_column(tile.span.start)))
    with pytest.raises(StoreError, match="No space is left"):
        store.write_tile(tile, {"hessian": [values]})
    with pytest.raises(StoreError):
        store.write_result("spectrum/b", {"values": np.zeros(1000)}, {})
    (tiny / "filler").unlink()
    again = Store.open(store.path, writable=True)
    assert again.missing_tiles() == (1,)
    checksum, written = again.write_tile(tile, {"hessian": [values]})
    again.mark([TileRecord(1, checksum, 0.5, written, 7, 0)])
    assert again.verify().ok
    assert {file: file.read_bytes() for file in before} == before


def test_the_lies_start_from_a_layout_that_is_trusted() -> None:
    value = attributes()
    assert trusted_layout(copy.deepcopy(value), "s.zarr").numel == 23


@pytest.mark.parametrize("split", [None, [1], {"x": 1}, {"0": "often"}, {"0": -1}])
def test_halvings_that_are_none_are_named_damage(split: object) -> None:
    whole = {"reduced": False, "quarantined": {}}
    assert "split" in attributes_trouble({**whole, "split": split})
    assert attributes_trouble({**whole, "split": {"0": 2}}) == ""
