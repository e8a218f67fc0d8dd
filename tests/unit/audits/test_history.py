"""A history of audits: what goes in comes out, whole or not at all, in order, for plain zarr too; damage gets a sentence."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from disthess.audits.encode import record_from_json, record_to_json
from disthess.audits.history import History
from disthess.audits.record import Alert, AuditRecord, BlockDensity, Estimate
from disthess.errors import HeldError, StoreError
from disthess.store.audit_group import AuditGroup
from disthess.store.lock import LeaseTimes, StoreLock
from disthess.store.place import ROOT, place_of
from disthess.store.seal import sealed


def make_record(key: str = "k0", step: int | None = 0, **fields: Any) -> AuditRecord:
    given: dict[str, Any] = {
        "checkpoint": f"step_{step}.pt",
        "taken": "2026-01-02T03:04:05+00:00",
        "seconds": 1.25,
        "products": 300,
        "facts": {"data": "sha256:ü", "seed": "0"},
        "estimates": (
            Estimate("lambda_max", "", 3.5, 3.4, 3.6, 0.95, "Lanczos"),
            Estimate("trace", "fc.weight", math.nan, -math.inf, math.inf, 0.95, "Lanczos"),
        ),
        "blocks": ("a", "b"),
        "arrays": {
            "density/grid": np.linspace(0, 1, 5),
            "block_density/grid": np.linspace(0, 1, 8).reshape(2, 4),
            "coupling/value": np.array([[1.0, np.nan], [np.nan, 1.0]]),
            "tile/../../b[0:2]": np.arange(6.0).reshape(2, 3),
        },
        "alerts": (Alert("sharp", "lambda_max", "", 3.5, 2.0, "too sharp"),),
        "densities": (BlockDensity("fc.weight", 40, 1, "Lanczos"), BlockDensity("fc.bias", 3, None, "exact")),
    }
    return AuditRecord(key=key, step=step, **{**given, **fields})


def same(left: AuditRecord, right: AuditRecord) -> bool:
    plain = [json.dumps(record_to_json(record)) for record in (left, right)]
    return (
        plain[0] == plain[1]
        and list(left.arrays) == list(right.arrays)
        and all(np.array_equal(left.arrays[name], right.arrays[name], equal_nan=True) for name in left.arrays)
    )


def test_what_goes_in_comes_out_in_order(tmp_path: Path) -> None:
    history = History.open_or_create(tmp_path / "deep" / "h.zarr")
    assert history.records() == ()
    assert not history.has("k0")
    records = [
        make_record("k0", 30),
        make_record("k1", 10, arrays={}, alerts=(), blocks=(), estimates=(), facts={}),
        make_record("k2", None, checkpoint="NaN"),
    ]
    for record in records:
        history.append(record)
    for reader in (history, History.open(tmp_path / "deep" / "h.zarr")):
        found = reader.records()
        assert all(same(*pair) for pair in zip(found, records, strict=True))
        assert reader.has("k1")
        assert not reader.has("k3")
    assert History.open(tmp_path / "deep" / "h.zarr").records()[2].checkpoint == "NaN"
    assert not (tmp_path / "deep" / "h.zarr.lock").exists()


def test_an_audit_from_before_blocks_had_densities_is_still_read(tmp_path: Path) -> None:
    old = {key: value for key, value in record_to_json(make_record()).items() if key != "densities"}
    old["array_names"] = {"density_grid": "density/grid"}
    History.open_or_create(tmp_path / "h.zarr")
    group = AuditGroup.open(tmp_path / "h.zarr")
    with group.writer():
        group.add({"density_grid": np.linspace(0, 1, 5)}, old)
    (found,) = History.open(tmp_path / "h.zarr").records()
    assert found.densities == ()
    assert found.density("fc.weight") is None
    assert found.estimates[0] == make_record().estimates[0]
    assert "densities" not in record_to_json(make_record(densities=()))


def test_a_key_is_appended_once_and_replaced_in_its_place(tmp_path: Path) -> None:
    history = History.open_or_create(tmp_path / "h.zarr")
    for number in range(3):
        history.append(make_record(f"k{number}", number))
    with pytest.raises(StoreError, match="already"):
        history.append(make_record("k1", 1))
    for seconds in (9.0, 10.0):
        history.append(make_record("k1", 1, seconds=seconds, arrays={}), replace=True)
    assert [(record.key, record.seconds) for record in history.records()] == [("k0", 1.25), ("k1", 10.0), ("k2", 1.25)]
    assert sorted(child.name for child in (tmp_path / "h.zarr").iterdir()) == ["000000-0", "000001-2", "000002-0", ROOT]


def test_plain_zarr_and_plain_json_read_it(tmp_path: Path) -> None:
    History.open_or_create(tmp_path / "h.zarr").append(make_record())
    group = zarr.open_group(str(tmp_path / "h.zarr"), mode="r")
    (name,) = group.group_keys()
    entry: Any = group[name]
    audit = entry.attrs["audit"]
    assert audit["estimates"]["rows"][1] == ["trace", "fc.weight", "NaN", "-Infinity", "Infinity", 0.95, 0]
    stored = {text: key for key, text in audit["array_names"].items()}
    assert set(stored) == set(make_record().arrays)
    assert stored["density/grid"] == "density_grid"
    np.testing.assert_array_equal(entry["tile_0"][...], np.arange(6.0).reshape(2, 3))
    assert [codec["name"] for codec in entry["tile_0"].metadata.to_dict()["codecs"]] == ["bytes", "crc32c"]

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    json.loads((tmp_path / "h.zarr" / name / ROOT).read_text(), parse_constant=refuse)


@pytest.mark.parametrize("moment", ["arrays", "attributes", "moved"])
def test_an_entry_half_written_is_not_seen_and_is_cleared_away(tmp_path: Path, moment: str) -> None:
    """The writer is killed for good: after its arrays, after its attributes, or before what it replaces is removed."""
    path = tmp_path / "h.zarr"
    History.open_or_create(path).append(make_record("k0", 0))
    child = multiprocessing.get_context("fork").Process(target=append_and_die, args=(path, moment))
    child.start()
    child.join()
    assert child.exitcode == 9
    assert [record.key for record in History.open(path).records()] == ["k0"]
    left = {entry.name for entry in path.iterdir()} - {"000000-0", ROOT}
    assert left
    History.open(path).append(make_record("k1", 1))
    assert [record.key for record in History.open(path).records()] == ["k0", "k1"]
    expected = "000000-1" if moment == "moved" else "000000-0"
    assert {entry.name for entry in path.iterdir()} == {expected, "000001-0", ROOT}


def append_and_die(path: Path, moment: str) -> None:
    from disthess.store import audit_group
    from disthess.store.place import LocalPlace

    if moment == "arrays":
        audit_group.write_value = lambda *_: os._exit(9)
    elif moment == "attributes":
        os.rename = lambda *_: os._exit(9)
    else:
        LocalPlace.withdraw = lambda *_: os._exit(9)
    History.open(path).append(make_record("k0" if moment == "moved" else "k1", 1), replace=True)


def test_what_an_object_store_is_left_with_is_not_seen(tmp_path: Path) -> None:
    """There the folder is there before its zarr.json; the same on a disk, which knows no difference."""
    path = tmp_path / "h.zarr"
    history = History.open_or_create(path)
    history.append(make_record("k0"))
    shutil.copytree(path / "000000-0", path / "000001-0")
    (path / "000001-0" / ROOT).unlink()
    assert len(history.records()) == 1
    history.append(make_record("k1", arrays={}))
    assert [record.key for record in history.records()] == ["k0", "k1"]
    assert [entry.name for entry in (path / "000001-0").iterdir()] == [ROOT]


def append_some(path: Path, worker: int) -> None:
    for number in range(4):
        History.open_or_create(path).append(make_record(f"{worker}-{number}", arrays={}))


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "h.zarr"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=append_some, args=(path, worker)) for worker in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    keys = [record.key for record in History.open(path).records()]
    assert sorted(keys) == sorted(f"{worker}-{number}" for worker in range(3) for number in range(4))
    for worker in range(3):
        mine = [key for key in keys if key.startswith(f"{worker}-")]
        assert mine == sorted(mine)


def test_a_lock_held_for_long_is_refused(tmp_path: Path) -> None:
    group = AuditGroup.open_or_create(tmp_path / "h.zarr")
    held = StoreLock(tmp_path / "h.zarr", LeaseTimes(wait=False))
    with held, pytest.raises(HeldError, match="being written by"), group.writer(patience_seconds=0.2):
        pass


def test_what_is_no_history_gets_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="There is no audit history at"):
        History.open(tmp_path / "none.zarr")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    zarr.create_group(str(tmp_path / "other.zarr"), zarr_format=3)
    History.open_or_create(tmp_path / "newer.zarr")
    place_of(tmp_path / "newer.zarr").write(
        ROOT, json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {"audits": {"schema": 2}}}).encode()
    )
    for name, words in {
        "file": "is a file",
        "empty": "no zarr.json",
        "other.zarr": "no audit history",
        "newer.zarr": "Install a newer",
    }.items():
        for way in (History.open, History.open_or_create):
            with pytest.raises(StoreError, match=words):
                way(tmp_path / name)


def spoil(path: Path, change: Any) -> None:
    """Change the audit of an entry, with a checksum that is right: as somebody would who means harm."""
    file = path / "000000-0" / ROOT
    value = json.loads(file.read_text())
    change(value["attributes"])
    value["attributes"] = sealed(value["attributes"])
    file.write_text(json.dumps(value))


HARMS = {
    "step": lambda a: a["audit"].update(step="7"),
    "negative": lambda a: a["audit"].update(step=-1),
    "huge": lambda a: a["audit"].update(products=10**400),
    "huge number": lambda a: a["audit"].update(seconds=10**400),
    "missing": lambda a: a["audit"].pop("key"),
    "facts": lambda a: a["audit"].update(facts=[1]),
    "rows": lambda a: a["audit"]["estimates"]["rows"].append([1, 2]),
    "how": lambda a: a["audit"]["estimates"]["rows"][0].__setitem__(6, 99),
    "columns": lambda a: a["audit"]["alerts"].update(columns=[]),
    "density": lambda a: a["audit"]["densities"]["rows"][0].__setitem__(2, "1"),
    "names": lambda a: a["audit"].update(array_names={"tile_0": 3}),
    "arrays": lambda a: a.update(arrays="all"),
    "mark": lambda a: a.update(audit=None),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_hostile_entry_gets_a_sentence(tmp_path: Path, harm: str) -> None:
    History.open_or_create(tmp_path / "h.zarr").append(make_record())
    spoil(tmp_path / "h.zarr", HARMS[harm])
    with pytest.raises(StoreError, match=r"The audit 000000-0 in the history .* is damaged"):
        History.open(tmp_path / "h.zarr").records()


def test_a_flipped_byte_is_an_error_and_no_number(tmp_path: Path) -> None:
    path = tmp_path / "h.zarr"
    History.open_or_create(path).append(make_record())
    file = path / "000000-0" / ROOT
    text = file.read_text()
    file.write_text(text.replace("3.5", "3.6", 1))
    with pytest.raises(StoreError, match="checksum"):
        History.open(path).records()
    unsealed = json.loads(text)
    del unsealed["attributes"]["checksum"]
    file.write_text(json.dumps(unsealed))
    with pytest.raises(StoreError, match="checksum"):
        History.open(path).records()
    file.write_text(text)
    chunk = path / "000000-0" / "density_grid" / "c" / "0"
    data = bytearray(chunk.read_bytes())
    data[3] ^= 1
    chunk.write_bytes(data)
    record = History.open(path).records()[0]
    np.testing.assert_array_equal(record.arrays["tile/../../b[0:2]"], np.arange(6.0).reshape(2, 3))
    with pytest.raises(StoreError, match="damaged"):
        _ = record.arrays["density/grid"]


def test_an_array_that_claims_to_be_vast_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "h.zarr"
    History.open_or_create(path).append(make_record())
    file = path / "000000-0" / "density_grid" / ROOT
    value = json.loads(file.read_text())
    value["shape"] = [2**38]
    value["chunk_grid"]["configuration"]["chunk_shape"] = [2**38]
    file.write_text(json.dumps(value))
    with pytest.raises(StoreError, match="damaged"):
        _ = History.open(path).records()[0].arrays["density/grid"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_change_of_the_json_is_refused_or_read(data: st.DataObject) -> None:
    value: Any = json.loads(json.dumps(record_to_json(make_record())))
    inner = value
    while True:
        key = data.draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
        if isinstance(inner[key], (dict, list)) and inner[key] and data.draw(st.booleans()):
            inner = inner[key]
            continue
        inner[key] = data.draw(json_values)
        break
    with contextlib.suppress(ValueError):
        record_from_json(value, {})


def test_many_audits_are_read_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = History.open_or_create(tmp_path / "h.zarr")
    for number in range(12):
        history.append(make_record(f"k{number}", number, arrays={}))
    asked: list[str] = []
    attributes = AuditGroup.attributes
    monkeypatch.setattr(AuditGroup, "attributes", lambda self, name: asked.append(name) or attributes(self, name))
    reader = History.open(tmp_path / "h.zarr")
    for _ in range(3):
        assert [record.step for record in reader.records()] == list(range(12))
    assert sorted(asked) == [f"{number:06d}-0" for number in range(12)]
    history.append(make_record("k3", 3, seconds=5.0, arrays={}), replace=True)
    assert [record.seconds for record in reader.records()][2:5] == [1.25, 5.0, 1.25]
    assert asked[12:].count("000003-1") == 1
