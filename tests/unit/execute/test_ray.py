"""The Ray executor with toy tiles: one Ray for the module, and one private one."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from disthess.errors import ExecutionError, StoreError
from disthess.execute.ray_executor import RayExecutor
from disthess.execute.signals import StopFlag, stop_on_signals

ray = pytest.importorskip("ray")


def _load_toys() -> Any:
    path = Path(__file__).with_name("toy_job.py")
    if "toy_job" not in sys.modules:
        spec = importlib.util.spec_from_file_location("toy_job", path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules["toy_job"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["toy_job"])
    return sys.modules["toy_job"]


toys = _load_toys()
_HERE = str(Path(__file__).parent)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = os.environ.get("RAY_AUTH_MODE")
    os.environ["RAY_AUTH_MODE"] = before or "disabled"
    path = os.pathsep.join([_HERE, os.environ.get("PYTHONPATH", "")])
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 << 20,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    yield
    ray.shutdown()
    if before is None:
        del os.environ["RAY_AUTH_MODE"]
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_two_workers_compute_what_one_process_does(tmp_path: Path, cluster: None) -> None:
    recorder = toys.Recorder()
    outcome = RayExecutor(2, threads=1).run(toys.ToyJob(tmp_path), toys.make_tiles(6, 2), recorder, StopFlag())
    assert (outcome.finished, outcome.failures, outcome.stopped) == (6, (), False)
    assert recorder.done == list(range(6))
    weights = np.arange(9.0).reshape(3, 3)
    for tile in range(6):
        np.testing.assert_array_equal(np.load(tmp_path / f"tile-{tile}.npy"), weights @ weights * tile)
    assert {event.record.checksum for event in recorder.events if isinstance(event, toys.TileDone)} == {1}
    assert (tmp_path / "opened-0").read_text() == "cpu 1"
    assert ray.is_initialized(), "a Ray that was there before stays"


def test_deaths_are_survived_and_poison_is_quarantined(tmp_path: Path, cluster: None) -> None:
    recorder = toys.Recorder()
    job = toys.ToyJob(tmp_path, {0: "exit once", 3: "exit", 4: "raise"})
    outcome = RayExecutor(2).run(job, toys.make_tiles(7, 2), recorder, StopFlag())
    assert recorder.done == [0, 1, 2, 5, 6]
    assert [tile for tile, _ in outcome.failures] == [3, 4]
    assert "process of its worker died" in outcome.failures[0][1]
    assert outcome.failures[1][1].startswith("ArithmeticError: tile 4 does not work")
    assert all(len(message) < 200 for _, message in outcome.failures)
    assert (tmp_path / "tries-3").stat().st_size == 3
    assert (tmp_path / "tries-0").stat().st_size == 2


def test_a_full_disk_ends_the_run(tmp_path: Path, cluster: None) -> None:
    recorder = toys.Recorder()
    with pytest.raises(StoreError, match="No space"):
        RayExecutor(1).run(toys.ToyJob(tmp_path, {1: "full"}), toys.make_tiles(5), recorder, StopFlag())
    assert recorder.done == [0]


def test_sigterm_finishes_what_is_in_flight(tmp_path: Path, cluster: None) -> None:
    (tmp_path / "driver").write_text(str(os.getpid()))
    recorder = toys.Recorder()
    with stop_on_signals() as stop:
        outcome = RayExecutor(1).run(toys.ToyJob(tmp_path, {1: "signal"}), toys.make_tiles(6), recorder, stop)
    assert outcome.stopped
    assert recorder.done == [0, 1]
    assert (tmp_path / "tile-1.npy").exists()
    assert not (tmp_path / "tries-2").exists()


def test_more_than_the_cluster_has_is_refused_at_once(tmp_path: Path, cluster: None) -> None:
    with pytest.raises(ExecutionError, match="does not fit into this Ray cluster"):
        RayExecutor(3, threads=50).run(toys.ToyJob(tmp_path), toys.make_tiles(3), toys.Recorder(), StopFlag())


def test_a_worker_that_does_not_open_is_one_clear_error(tmp_path: Path, cluster: None) -> None:
    job = toys.ToyJob(tmp_path, open_fault="no such model")
    with pytest.raises(ExecutionError, match="could be opened: ValueError: no such model"):
        RayExecutor(2).run(job, toys.make_tiles(4, 2), toys.Recorder(), StopFlag())
