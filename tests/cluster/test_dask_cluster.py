"""Dask workers inside Ray actors give the numbers of threads, and leave nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import disthess
from disthess.errors import ConfigError

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
sys.path.insert(0, {here!r})
import dask
import numpy as np
import psutil
import disthess
import test_same_bytes as t

options = {{**t.OPTIONS, "shared": "uses"}}
store = disthess.compute(t.problem(), {folder!r} + "/threads.zarr", **options)
with disthess.dask_cluster(workers=2) as client:
    assert len(client.scheduler_info()["workers"]) == 2
    with_threads, with_workers = store.blocks(), store.blocks(client=client)
    assert [(r.a, r.b, r.norm) for r in with_threads.rows()] == [(r.a, r.b, r.norm) for r in with_workers.rows()]
    assert with_threads.trace == with_workers.trace
    before = set(client.has_what())
    total = store.dask().sum().compute()
    assert np.isclose(total, store.dense().sum(dtype=np.float64))
    seen = client.run(lambda dask_worker: dask_worker.state.executed_count)
    assert all(seen.values()), seen
    other = disthess.compute(t.problem(), {folder!r} + "/workers.zarr", client=client, **options)
    assert any(panel.reduced for panel in other.layout.panels)
    closed = client
from pathlib import Path
assert t.array_bytes(Path({folder!r} + "/threads.zarr")) == t.array_bytes(Path({folder!r} + "/workers.zarr"))
assert store.blocks().frobenius == with_threads.frobenius
try:
    store.blocks(client=closed)
except disthess.errors.ConfigError as error:
    print(error)
print([process.name() for process in psutil.Process().children(recursive=True)])
"""


@pytest.mark.slow
def test_workers_in_ray_actors_give_the_same_numbers_and_end(tmp_path: Path) -> None:
    script = SCRIPT.format(here=str(Path(__file__).parent), folder=str(tmp_path))
    script = "import disthess.errors\n" + script
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = done.stdout.splitlines()[-2:]
    assert first.startswith("the client is closed")
    assert second == "[]"


def test_what_is_no_client_is_refused_in_a_sentence() -> None:
    from disthess.reduce.scheduler import scheduler_of

    with pytest.raises(ConfigError, match=r"must be a dask.distributed Client or None, got str"):
        scheduler_of("tcp://somewhere:8786")
    with pytest.raises(ConfigError, match="must be positive"), disthess.dask_cluster(workers=0):
        pass
