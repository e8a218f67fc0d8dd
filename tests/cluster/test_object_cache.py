"""A cache of blocks on an object store, over HTTP: computed once and read by others, killed, cut short, and refused.

The server is moto's, or with ``DISTHESS_TEST_RGW=1`` Ceph's radosgw, as in ``test_object_store.py``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from s3_server import BUCKET, answering, environment, environment_set, moto_server, radosgw
from torch import nn
from typer.testing import CliRunner

import disthess
from disthess.cli.main import app
from disthess.errors import ConfigError, StoreError
from disthess.problem import Problem
from disthess.store.cache import CacheStore
from disthess.store.claim import Claim
from disthess.store.lock import StoreLock
from disthess.store.place import place_of

obstore = pytest.importorskip("obstore")

TOP, LEFT = slice(0, 8), slice(8, 24)


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[str]:
    started = radosgw if os.environ.get("DISTHESS_TEST_RGW") == "1" else moto_server
    with started() as url, environment_set(environment(url)):
        yield url


@pytest.fixture
def place() -> str:
    return f"s3://{BUCKET}/caches/{uuid.uuid4().hex}/blocks.zarr"


def problem(seed: int = 3) -> Problem:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return Problem(
        model, loss="cross_entropy", batches=[(torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,)))]
    )


def wanted() -> np.ndarray:
    return np.asarray(disthess.reference_hessian(problem()))[TOP, LEFT]


def files(path: str) -> dict[str, bytes]:
    """All objects below a URL, by a client of its own."""
    store = obstore.store.from_url(path)
    keys = [entry["path"] for page in obstore.list(store) for entry in page]
    return {key: bytes(obstore.get(store, key).bytes()) for key in keys}


def in_another_process(place: str, *lines: str) -> subprocess.CompletedProcess[str]:
    """Python lines after ``place`` and this module, as ``t``, are there."""
    head = (
        f"import os, sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_object_cache as t, disthess"
    )
    code = "\n".join([head, f"place = {place!r}", *lines])
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)


@pytest.mark.slow
def test_a_tile_is_computed_once_and_read_by_another_process(place: str, tmp_path: Path) -> None:
    cache = disthess.open_cache(place, problem(), chunk=8)
    assert cache.path == place
    tile = cache.read(TOP, LEFT, compute=True)
    assert cache.products == 8
    np.testing.assert_allclose(tile, wanted(), rtol=0, atol=1e-13)
    assert files(place + ".lock") == {}
    # The same objects, byte for byte, that a cache on a disk has as files; but for seconds in the records.
    local = tmp_path / "c.zarr"
    disthess.open_cache(local, problem(), chunk=8).read(TOP, LEFT, compute=True)
    here = {file.relative_to(local).as_posix(): file.read_bytes() for file in local.rglob("*") if file.is_file()}
    there = files(place)
    assert set(there) == set(here)
    assert {"hessian/c/0/1", "hessian/c/0/2"} <= set(there)
    assert all(there[key] == here[key] for key in there if not key.startswith("ledger/0."))
    before = there
    done = in_another_process(
        place,
        "import json",
        "from disthess.sweep import region",
        "region.RegionTape.__init__ = None  # whoever computes fails",
        "cache = disthess.open_cache(place, t.problem())",
        "again = cache.read(t.TOP, t.LEFT, compute=True)",
        "assert cache.products == 0",
        "assert (disthess.open_cache(place).read(t.LEFT, t.TOP).T == again).all()",
        "print(json.dumps(again.tolist()))",
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.array(json.loads(done.stdout)), tile)
    assert files(place) == before


@pytest.mark.slow
def test_a_killed_process_leaves_no_tile_that_looks_whole_and_no_lock(place: str) -> None:
    done = in_another_process(
        place,
        "from disthess.store.cache import CacheStore",
        "mark = CacheStore.mark",
        "CacheStore.mark = lambda self, record: os._exit(9) if record.column == 2 else mark(self, record)",
        "disthess.open_cache(place, t.problem(), chunk=8).read(t.TOP, t.LEFT, compute=True)",
    )
    assert done.returncode == 9, done.stderr
    # Of two chunks both have data and one a record.
    assert {"hessian/c/0/1", "hessian/c/0/2", "ledger/0.1/zarr.json"} <= set(files(place))
    assert "holder" in files(place + ".lock")
    opened = CacheStore.open(place)
    assert opened.present() == ((0, 1),)
    report = opened.verify()
    assert (report.checked, report.unmarked, report.ok) == (1, 1, True)
    np.testing.assert_allclose(disthess.open_cache(place).read(TOP, slice(8, 16)), wanted()[:, :8], rtol=0, atol=1e-13)
    with pytest.raises(StoreError, match=r"1 of 2 chunks .* are not in s3://"):
        disthess.open_cache(place).read(TOP, LEFT)
    started = time.monotonic()
    cache = disthess.open_cache(place, problem())
    np.testing.assert_allclose(cache.read(TOP, LEFT, compute=True), wanted(), rtol=0, atol=1e-13)
    assert time.monotonic() - started < 50, "it waited for a heartbeat of a process known to be dead"
    assert cache.products == 8
    assert files(place + ".lock") == {}
    assert CacheStore.open(place).verify().unmarked == 0


class _Died(Exception):
    pass


def _die_at(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """The write of that key does not happen, as if the process had been killed."""
    from disthess.store.object_place import ObjectPlace

    for name in ("write", "create"):
        real = getattr(ObjectPlace, name)

        def broken(self: ObjectPlace, given: str, data: bytes, real: Any = real) -> Any:
            if given == key:
                raise _Died
            return real(self, given, data)

        monkeypatch.setattr(ObjectPlace, name, broken)


def test_a_tile_without_its_record_is_not_there(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = disthess.open_cache(place, problem(), chunk=8)
    with monkeypatch.context() as patch:
        _die_at(patch, "ledger/0.2/zarr.json")
        with pytest.raises(_Died):
            cache.read(TOP, LEFT, compute=True)
    assert {"hessian/c/0/1", "hessian/c/0/2", "ledger/0.1/zarr.json"} <= set(files(place))
    alone = disthess.open_cache(place)
    assert [(entry.row, entry.column) for entry in alone.records()] == [(0, 1)]
    np.testing.assert_allclose(alone.read(TOP, slice(8, 16)), wanted()[:, :8], rtol=0, atol=1e-13)
    with pytest.raises(StoreError, match=r"1 of 2 chunks .* are not in s3://"):
        alone.read(TOP, LEFT)
    assert CacheStore.open(place, writable=True).verify(repair=True).unmarked == 1
    assert "hessian/c/0/2" not in files(place)
    np.testing.assert_allclose(cache.read(TOP, LEFT, compute=True), wanted(), rtol=0, atol=1e-13)


def test_a_cache_half_made_is_none_and_is_made_again(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        _die_at(patch, "zarr.json")
        with pytest.raises(_Died):
            disthess.open_cache(place, problem(), chunk=8)
    assert "ledger/zarr.json" in files(place)
    with pytest.raises(StoreError, match="There is no store at s3://"):
        disthess.open_cache(place)
    assert disthess.open_cache(place, problem(), chunk=4).store.chunk == 4
    assert set(files(place)) == {"zarr.json", "hessian/zarr.json", "ledger/zarr.json"}


@pytest.mark.parametrize("harm", ["cut", "bent", "lost", "record cut"])
def test_a_torn_tile_is_refused_forgotten_and_computed_again(place: str, harm: str) -> None:
    cache = disthess.open_cache(place, problem(), chunk=8)
    tile = cache.read(TOP, LEFT, compute=True)
    raw, chunk, record = obstore.store.from_url(place), "hessian/c/0/1", "ledger/0.1/zarr.json"
    data, told = files(place)[chunk], files(place)[record]
    if harm == "lost":
        obstore.delete(raw, chunk)
    elif harm == "record cut":
        obstore.put(raw, record, told[:-20])
    else:
        obstore.put(raw, chunk, data[: len(data) // 2] if harm == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    for reader in (cache, disthess.open_cache(place)):
        with pytest.raises(StoreError, match=r"rows 0 to 7, columns 8 to 15 of s3://.* damaged.*--repair"):
            reader.read(TOP, LEFT)
    assert CliRunner().invoke(app, ["verify", place]).exit_code == 1
    mended = CliRunner().invoke(app, ["verify", place, "--repair"])
    assert mended.exit_code == 0, mended.output
    assert {chunk, record} & set(files(place)) == set()
    with pytest.raises(StoreError, match="1 of 2 chunks"):
        cache.read(TOP, LEFT)
    before = cache.products
    # One chunk alone is computed by its columns: the same to rounding.
    np.testing.assert_allclose(cache.read(TOP, LEFT, compute=True), tile, rtol=0, atol=1e-15)
    assert cache.products == before + 8


def test_what_is_wrong_is_refused_with_the_reason(place: str) -> None:
    with pytest.raises(StoreError, match=f"There is no store at {place}"):
        disthess.open_cache(place)
    cache = disthess.open_cache(place, problem(), chunk=8)
    cache.read(0, 0, compute=True)
    with pytest.raises(StoreError, match=r"s3://.* another problem.*batches"):
        disthess.open_cache(place, problem(seed=4))
    alone = disthess.open_cache(place)
    with pytest.raises(StoreError, match=r"are not in s3://.*compute=True.*8 Hessian-vector products"):
        alone.read(TOP, LEFT)
    with pytest.raises(ConfigError, match=f"needs the problem: open {place}"):
        alone.read(TOP, LEFT, compute=True)
    with pytest.raises(StoreError, match="cache of single blocks"):
        disthess.open_store(place)
    with StoreLock(place):
        assert cache.read(TOP, TOP, compute=True).shape == (8, 8)
        with pytest.raises(StoreError, match=rf"written by process {os.getpid()}"):
            cache.read(TOP, LEFT, compute=True)
    whole = place.replace("blocks", "whole")
    disthess.compute(problem(), whole, progress=False, threads=1)
    with pytest.raises(StoreError, match=r"whole\.zarr is no cache of blocks.*open_store"):
        disthess.open_cache(whole, problem())
    mine = place.replace("blocks", "mine")
    place_of(mine).write("notes.txt", b"mine")
    with pytest.raises(StoreError, match=r"is no store.*Nothing was overwritten"):
        disthess.open_cache(mine, problem())
    assert files(mine) == {"notes.txt": b"mine"}
    with pytest.raises(StoreError, match="There is no bucket s3://nobody"):
        disthess.open_cache("s3://nobody/blocks.zarr", problem())
    with (
        answering(403, "AccessDenied") as (url, _),
        environment_set(environment(url)),
        pytest.raises(StoreError, match="refuses access"),
    ):
        disthess.open_cache(place, problem())


@pytest.mark.slow
def test_a_server_that_is_not_there_is_named_and_not_taken_for_an_empty_cache(place: str, server: str) -> None:
    cache = disthess.open_cache(place, problem(), chunk=8)
    with environment_set({**environment(server), "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}):
        for given in (None, problem()):
            with pytest.raises(StoreError, match="cannot be reached"):
                disthess.open_cache(place, given)
    assert cache.read(0, 0, compute=True).shape == (1, 1)


def test_a_writer_that_was_superseded_marks_nothing(place: str) -> None:
    cache = disthess.open_cache(place, problem(), chunk=8)
    store = CacheStore.open(place, writable=True)
    with StoreLock(place) as lock:
        store.hold(lock)
        mine = json.loads(files(place + ".lock")["holder"])
        other = Claim(token="abc", host="elsewhere", pid=1)
        assert place_of(place + ".lock").create(f"after-{mine['token']}", other.to_bytes())
        lock._renew()
        with pytest.raises(StoreError, match=r"host elsewhere.*has taken over"):
            store.write(0, 1, np.zeros((8, 8)))
    assert cache.store.present() == ()
    assert not any(key.startswith("hessian/c/") for key in files(place))


RUN_FILE = """
problem: {{factory: "{here}/test_object_cache.py:problem"}}
compute: {{store: runs/never.zarr}}
"""


def test_the_command_line_takes_a_url(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN_FILE.format(here=Path(__file__).parent))
    ask = ["block", place, "0.weight", "0.bias", "--out", "block.npy"]
    first = CliRunner().invoke(app, [*ask, "--compute", "--config", "run.yaml"])
    assert first.exit_code == 0, first.output
    assert "have to be computed" in first.output
    exact = np.asarray(disthess.reference_hessian(problem()))[:24, 24:30]
    np.testing.assert_allclose(np.load("block.npy"), exact, rtol=0, atol=1e-13)
    again = CliRunner().invoke(app, [*ask, "--compute", "--config", "run.yaml"])
    assert "nothing to compute" in again.output
    assert CliRunner().invoke(app, ask).exit_code == 0
    told = json.loads(CliRunner().invoke(app, ["info", place, "--json"]).output)
    assert (told["kind"], told["path"], told["chunks"]) == ("cache", place, 1)
    assert CliRunner().invoke(app, ["verify", place]).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["block.npy", "run.yaml"]
