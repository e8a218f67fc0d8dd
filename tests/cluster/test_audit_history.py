"""A history of audits on an object store: appended, replaced, read by others, and what a killed writer leaves there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from s3_server import BUCKET, environment, environment_set, moto_server

import disthess
from disthess.audits.history import History
from disthess.audits.record import AuditRecord, Estimate
from disthess.errors import StoreError
from disthess.store.place import ROOT, place_of

URL = f"s3://{BUCKET}/runs/audits.zarr"


@pytest.fixture(scope="module", autouse=True)
def _server() -> Iterator[None]:
    with moto_server() as url, environment_set(environment(url)):
        yield


def make_record(key: str, step: int) -> AuditRecord:
    estimate = Estimate("lambda_max", "", float(step), step - 0.5, step + 0.5, 0.95, "Lanczos")
    arrays = {"density/grid": np.arange(3.0) + step}
    return AuditRecord(key, f"{step}.pt", step, "2026-01-01T00:00:00+00:00", 1.0, 5, {}, (estimate,), arrays=arrays)


def test_a_history_lives_on_an_object_store() -> None:
    with pytest.raises(StoreError, match="There is no audit history"):
        History.open(URL)
    history = History.open_or_create(URL)
    for number in range(2):
        history.append(make_record(f"key-{number}", number))
    place = place_of(URL)
    # A writer that was killed before its last write: arrays, and no zarr.json.
    place.write("000002-0/density_grid/c/0", b"half")
    reader = History.open(URL)
    assert [record.key for record in reader.records()] == ["key-0", "key-1"]
    np.testing.assert_array_equal(reader.records()[1].arrays["density/grid"], [1, 2, 3])
    with pytest.raises(StoreError, match="already"):
        history.append(make_record("key-0", 0))
    history.append(replace(make_record("key-0", 0), seconds=7.0), replace=True)
    history.append(make_record("key-2", 2))
    assert [(record.key, record.seconds) for record in reader.records()] == [("key-0", 7), ("key-1", 1), ("key-2", 1)]
    assert place.children() == ["000000-1", "000001-0", "000002-0", ROOT]
    assert place_of(f"{URL}.lock").children() == []
    row = disthess.diff(f"{URL}@0", f"{URL}@-1").find("lambda_max")
    assert row is not None
    assert (row.a, row.b, row.verdict) == (0, 2, "rose")


def test_what_else_lies_there_is_left_alone() -> None:
    place_of(f"s3://{BUCKET}/other").write("file", b"x")
    with pytest.raises(StoreError):
        History.open_or_create(f"s3://{BUCKET}/other")
    assert place_of(f"s3://{BUCKET}/other").children() == ["file"]
