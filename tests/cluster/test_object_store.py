"""A store on an object store, over HTTP: the conformance suite, runs, resume, damage, the lease, and plain readers.

The server is moto's. With ``DISTHESS_TEST_RGW=1`` it is a real one, Ceph's radosgw, which ``radosgw.sh`` starts on this machine.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import signal
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
from typer.testing import CliRunner

import disthess
from disthess.cli.main import app
from disthess.errors import StoreError
from disthess.problem import Problem
from disthess.store.claim import Claim
from disthess.store.lock import StoreLock
from disthess.store.place import AbstractPlace, place_of
from disthess.store.store import Store
from disthess.types import Span

obstore = pytest.importorskip("obstore")

REAL = os.environ.get("DISTHESS_TEST_RGW") == "1"

OPTIONS: dict[str, Any] = {"threads": 1, "progress": False, "parts": ("hessian", "ggn"), "dtype": "float64"}


def _load_suite() -> Any:
    path = Path(__file__).parents[1] / "conformance" / "store_suite.py"
    spec = importlib.util.spec_from_file_location("store_suite", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("store_suite", module)
    spec.loader.exec_module(module)
    return module


suite = _load_suite()


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[str]:
    with radosgw() if REAL else moto_server() as url, environment_set(environment(url)):
        yield url


@pytest.fixture
def place() -> str:
    return f"s3://{BUCKET}/deep/{uuid.uuid4().hex}/run.zarr"


def files(path: str) -> dict[str, bytes]:
    """All objects below a URL, by a client of its own."""
    store = obstore.store.from_url(path)
    keys = [entry["path"] for page in obstore.list(store) for entry in page]
    return {key: bytes(obstore.get(store, key).bytes()) for key in keys}


def chunks(found: dict[str, bytes]) -> dict[str, bytes]:
    kinds = ("panels/", "uses/", "gradient/", "loss/")
    return {key: data for key, data in found.items() if key.startswith(kinds)}


def groups(found: dict[str, bytes]) -> set[str]:
    """Groups and arrays, but for results that were asked for later."""
    return {key for key in found if key.endswith("zarr.json") and not key.startswith("spectrum/")}


def local_files(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def problem() -> Problem:
    torch.manual_seed(3)
    shared = torch.nn.Linear(9, 9)
    model = torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.Tanh(), shared, torch.nn.Tanh(), shared)
    return Problem(model, loss="cross_entropy", batches=[(torch.randn(20, 4), torch.randint(0, 9, (20,)))])


class TestObjectStore(suite.StoreSuite):  # type: ignore[misc]
    def flip(self, place: str, array: str, chunk: str) -> None:
        store = obstore.store.from_url(place)
        raw = bytearray(obstore.get(store, f"{array}/c/{chunk}").bytes())
        raw[11] ^= 4
        obstore.put(store, f"{array}/c/{chunk}", bytes(raw))


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("local") / "run.zarr"
    disthess.compute(problem(), path, **OPTIONS)
    return path


@pytest.fixture(scope="module")
def remote(server: str) -> str:
    """A store that nobody changes."""
    path = f"s3://{BUCKET}/remote/run.zarr"
    disthess.compute(problem(), path, **OPTIONS)
    return path


@pytest.mark.slow
def test_ray_workers_write_the_bytes_of_a_local_run(place: str, local: Path) -> None:
    disthess.compute(problem(), place, executor="ray", workers=2, **OPTIONS)
    assert chunks(files(place)) == chunks(local_files(local))
    assert {record.worker for record in Store.open(place).records()} <= {0, 1}
    assert files(place + ".lock") == {}


def test_a_run_writes_the_bytes_of_a_local_one_and_answers_alike(remote: str, local: Path) -> None:
    store, place = disthess.open_store(remote), remote
    found = files(place)
    assert chunks(found) == chunks(local_files(local))
    assert groups(found) == groups(local_files(local))
    assert files(place + ".lock") == {}
    near = disthess.open_store(local)
    assert store.path == place
    assert store.certificate("ggn") is not None
    np.testing.assert_array_equal(store.block("0.weight", "2.bias"), near.block("0.weight", "2.bias"))
    np.testing.assert_array_equal(store.dense("ggn"), near.dense("ggn"))
    vectors = np.random.default_rng(0).standard_normal((store.numel, 3))
    np.testing.assert_array_equal(store.operator() @ vectors, near.operator() @ vectors)
    pairs = disthess.eigenvalues(store, k=2)
    np.testing.assert_allclose(pairs.values, disthess.eigenvalues(near, k=2).values, rtol=1e-12)
    assert any(name.startswith("spectrum/") for name in store.store.result_names())
    assert store.store.nbytes_on_disk() == sum(map(len, files(place).values()))


_KILLED = """
import os, signal, sys
sys.path.insert(0, {here!r})
import test_object_store as t
import disthess
from disthess.store.store import Store
count = 0
write = Store.write_tile
def write_and_die(self, tile, arrays):
    global count
    if count == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    count += 1
    return write(self, tile, arrays)
Store.write_tile = write_and_die
disthess.compute(t.problem(), {place!r}, **t.OPTIONS)
"""


@pytest.mark.slow
def test_a_killed_run_resumes_at_once_to_the_same_bytes(place: str, local: Path) -> None:
    script = _KILLED.format(here=str(Path(__file__).parent), place=place)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert "holder" in files(place + ".lock")
    assert disthess.open_store(place).missing_tiles()
    started = time.monotonic()
    disthess.compute(problem(), place, **OPTIONS)
    assert time.monotonic() - started < 50, "it waited for a heartbeat of a process known to be dead"
    assert chunks(files(place)) == chunks(local_files(local))
    assert files(place + ".lock") == {}


def test_lost_and_damaged_chunks_are_found_mended_and_computed_again(place: str, local: Path) -> None:
    disthess.compute(problem(), place, **OPTIONS)
    whole = chunks(files(place))
    raw = obstore.store.from_url(place)
    lost = next(key for key in sorted(whole) if key.startswith("panels/hessian/0/c/"))
    bent = next(key for key in sorted(whole, reverse=True) if key.startswith("uses/ggn/") and "/c/" in key)
    obstore.delete(raw, lost)
    obstore.put(raw, bent, whole[bent][:-1] + bytes([whole[bent][-1] ^ 1]))
    with pytest.raises(StoreError, match=r"is not there.*--repair"):
        disthess.open_store(place).dense()
    with pytest.raises(StoreError, match=r"is not there.*--repair"):
        disthess.open_store(place).operator() @ np.ones(disthess.open_store(place).numel)
    report = Store.open(place, writable=True).verify(repair=True)
    assert len(report.damaged) == 2
    assert disthess.open_store(place).missing_tiles() == tuple(sorted(entry.tile for entry in report.damaged))
    disthess.compute(problem(), place, **OPTIONS)
    assert chunks(files(place)) == whole == chunks(local_files(local))
    assert Store.open(place).verify().ok


def test_nothing_that_was_computed_is_lost_where_a_number_is_nan(place: str) -> None:
    """A chunk that holds NaN is not taken for one that is missing."""
    layout = suite.make_layout()
    store = Store.create(place, layout, {})
    arrays = suite.tile_arrays(layout, layout.tiles[0])
    arrays["hessian"][0][2, 3] = np.nan
    store.write_tile(layout.tiles[0], arrays)
    got = pickle.loads(pickle.dumps(store)).read(layout.panels[0], "hessian", layout.tiles[0].span, Span(0, 21))
    np.testing.assert_array_equal(got, arrays["hessian"][0])


def test_a_second_run_is_refused_and_a_superseded_one_stops(place: str) -> None:
    with StoreLock(place) as lock, pytest.raises(StoreError, match=rf"written by process {os.getpid()}"):
        disthess.compute(problem(), place, **OPTIONS)
    with StoreLock(place) as lock:
        store = Store.create(place, suite.make_layout(), {"fingerprint": {}})
        store.hold(lock)
        store.write_loss(1.0)
        raw = obstore.store.from_url(place + ".lock")
        mine = json.loads(bytes(obstore.get(raw, "holder").bytes()))
        other = Claim(token="abc", host="elsewhere", pid=1)
        assert place_of(place + ".lock").create(f"after-{mine['token']}", other.to_bytes())
        lock._renew()
        with pytest.raises(StoreError, match=r"host elsewhere.*has taken over"):
            suite.write(store, 0)
        assert store.missing_tiles() == tuple(range(len(store.layout.tiles)))
    assert set(files(place + ".lock")) == {"holder", f"after-{mine['token']}"}


def test_of_many_that_create_one_is_told_so(place: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    here = place_of(place)
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda number: here.create("key", str(number).encode()), range(8)))
    assert won.count(True) == 1
    assert here.read("key") == str(won.index(True)).encode()
    assert here.create("key", str(won.index(True)).encode()), "the same bytes: an answer that was lost"


class _Died(Exception):
    pass


def _die_at(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """The next write of that key does not happen, as if the process had been killed."""
    from disthess.store.object_place import ObjectPlace

    for name in ("write", "create"):
        real = getattr(ObjectPlace, name)

        def broken(self: AbstractPlace, given: str, data: bytes, real: Any = real) -> Any:
            if given == key:
                raise _Died
            return real(self, given, data)

        monkeypatch.setattr(ObjectPlace, name, broken)


def test_a_store_half_made_is_no_store_and_is_made_again(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        _die_at(patch, "zarr.json")
        with pytest.raises(_Died):
            Store.create(place, suite.make_layout(), {})
    assert "ledger/zarr.json" in files(place)
    with pytest.raises(StoreError, match="There is no store at s3://"):
        Store.open(place)
    Store.create(place, suite.make_layout(row_chunk=2), {})
    assert ".disthess-creating" not in files(place)
    assert Store.open(place).layout.panels[0].row_chunk == 2
    with pytest.raises(StoreError, match="exists already; open it"):
        Store.create(place, suite.make_layout(), {})


def test_what_is_no_store_is_not_overwritten(place: str) -> None:
    place_of(place).write("notes.txt", b"mine")
    with pytest.raises(StoreError, match=r"is no store.*Nothing was overwritten"):
        Store.create(place, suite.make_layout(), {})
    with pytest.raises(StoreError, match="is no store"):
        Store.open(place)
    assert files(place) == {"notes.txt": b"mine"}


def test_a_result_half_written_is_not_there(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.create(place, suite.make_layout(), {})
    store.write_result("spectrum/a", {"values": np.arange(3.0), "old": np.ones(1)}, {"k": 1})
    store.write_result("lowrank/b", {"values": np.zeros(2)}, {})
    with monkeypatch.context() as patch:
        _die_at(patch, "spectrum/a/zarr.json")
        with pytest.raises(_Died):
            store.write_result("spectrum/a", {"values": np.arange(4.0)}, {"k": 2})
    assert not store.has_result("spectrum/a")
    assert store.result_names() == ("lowrank/b",)
    assert any(key.startswith("spectrum/a/values") for key in files(place))
    store.verify(repair=True)
    assert not any(key.startswith("spectrum/a") for key in files(place))
    store.write_result("spectrum/a", {"values": np.arange(4.0)}, {"k": 2})
    assert store.read_result("spectrum/a")[1] == {"k": 2}
    store.remove_result("spectrum/a")
    assert store.result_names() == ("lowrank/b",)


_READER = """
import json, sys, warnings
import zarr
from obstore.store import from_url
root = zarr.open_group(zarr.storage.ObjectStore(from_url({place!r}), read_only=True), mode="r", use_consolidated=False)
layout = root.attrs["layout"]
panel = next(p for p in layout["panels"] if p["source"] == "0.weight" and p["kind"] == "panels")
names = [name for name, _ in panel["targets"]]
start = sum(columns for _, columns in panel["targets"][: names.index("0.bias")])
block = root["panels/hessian/%d" % panel["index"]][:, start : start + 9]
assert "disthess" not in sys.modules
print(json.dumps(block.tolist()))
"""


def test_plain_zarr_reads_it(remote: str, local: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _READER.format(place=remote)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    wanted = disthess.open_store(local).block("0.weight", "0.bias")
    np.testing.assert_array_equal(np.array(json.loads(done.stdout)), wanted)


RUN_FILE = """
problem:
  factory: {here}/test_object_store.py:problem
compute: {{store: runs/never.zarr, threads: 1, dtype: float64}}
report: {{eigenvalues: 2, blocks: 2, density: true, pictures: true}}
"""


@pytest.mark.slow
def test_the_command_line_takes_urls(place: str, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "run.yaml"
    config.write_text(RUN_FILE.format(here=Path(__file__).parent))
    lines = [
        ("run", str(config), "--store", place),
        ("info", place, "--json"),
        ("block", place, "0.weight", "0.bias", "--out", str(tmp_path / "block.npy")),
        ("verify", place, "--repair", "--json"),
        ("spectrum", place, "--top", "2", "--json"),
    ]
    said = {}
    for line in lines:
        done = CliRunner().invoke(app, line)
        assert done.exit_code == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        said[line[0]] = done.stdout
    assert place in said["run"]
    assert json.loads(said["info"])["tiles"]["missing"] == 0
    assert json.loads(said["verify"])["whole"]
    np.testing.assert_array_equal(
        np.load(tmp_path / "block.npy"), disthess.open_store(local).block("0.weight", "0.bias")
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["block.npy", "run.pictures", "run.yaml"]
    done = CliRunner().invoke(app, ["info", "s3://nobody/run.zarr"])
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("disthess: There is no")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "url", "message"),
    [
        ({}, "s3://nobody/run.zarr", "There is no bucket s3://nobody"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, f"s3://{BUCKET}/run.zarr", "cannot be reached"),
        ({"AWS_ALLOW_HTTP": "false"}, f"s3://{BUCKET}/run.zarr", "AWS_ALLOW_HTTP=true"),
        ({"AWS_ACCESS_KEY_ID": ""}, f"s3://{BUCKET}/run.zarr", "refuses access.*AWS_ACCESS_KEY_ID"),
        ({}, "az://container/run.zarr", "refuses access.*credentials"),
        ({}, "memory://run.zarr", "cannot hold a store.*s3://bucket"),
        ({}, "file:///tmp/run.zarr", "cannot hold a store"),
        ({}, f"s3://{BUCKET}", "a bucket and a name in it"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence_and_soon(
    server: str, changes: dict[str, str], url: str, message: str
) -> None:
    values = {key: value for key, value in {**environment(server), **changes}.items() if value}
    started = time.monotonic()
    with environment_set(values):
        with pytest.raises(StoreError, match=message):
            Store.create(url, suite.make_layout(), {})
        with pytest.raises(StoreError, match=f"{message}|There is no store at {url}"):
            disthess.open_store(url)
    assert time.monotonic() - started < 90


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (
            403,
            "SignatureDoesNotMatch",
            r"refuses access to s3://bucket/run\.zarr.* \(SignatureDoesNotMatch.*AWS_SECRET_ACCESS_KEY",
        ),
        (503, "SlowDown", "failed: SlowDown.*run again"),
    ],
)
def test_what_a_server_refuses_is_said_and_not_tried_forever(status: int, code: str, message: str) -> None:
    with (
        answering(status, code) as (url, requests),
        environment_set(environment(url)),
        pytest.raises(StoreError, match=message),
        StoreLock("s3://bucket/run.zarr"),
    ):
        pass
    assert 1 <= len(requests) <= 6


@pytest.mark.skipif(not REAL, reason="moto believes any key; DISTHESS_TEST_RGW=1 starts a server that does not")
def test_wrong_keys_are_refused(server: str) -> None:
    for wrong in ({"key": "nobody"}, {"secret": "wrong"}):
        with (
            environment_set(environment(server, **wrong)),
            pytest.raises(StoreError, match=r"refuses access.*(403 Forbidden|AccessKeyId|SignatureDoesNotMatch)"),
        ):
            Store.create(f"s3://{BUCKET}/run.zarr", suite.make_layout(), {})


def test_without_obstore_one_is_told_what_to_install() -> None:
    code = "import sys; sys.modules['obstore'] = None\nfrom disthess.store.place import place_of\nplace_of('s3://b/run.zarr')"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert "StoreError: The store s3://b/run.zarr is on an object store" in done.stderr
    assert 'pip install "disthess[s3]"' in done.stderr
