"""Workers as forked processes: the contract of the other executors, and what becomes of children."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import toy_job as toys

import disthess
from disthess.errors import ConfigError, ExecutionError
from disthess.execute import forked, process_executor
from disthess.execute.events import TileDone
from disthess.execute.process_executor import ProcessExecutor
from disthess.execute.signals import StopFlag
from disthess.store.layout import Tile, TileRecord

pytestmark = pytest.mark.skipif(bool(forked.why_not()), reason=forked.why_not() or "here")


def wait_until(done: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


class JobOf(toys.ToyJob):
    """A toy job whose workers are made by a function."""

    def __init__(self, folder: Path, make: Callable[..., toys.ToyWorker]) -> None:
        super().__init__(folder)
        self._make = make

    def open(self, weights: Any, worker: int, device: str, threads: int) -> toys.ToyWorker:
        super().open(weights, worker, device, threads)
        return self._make(self._folder, self.weights, worker, {})


def test_every_tile_is_computed_once_by_one_opened_job(tmp_path: Path) -> None:
    recorder = toys.Recorder()
    outcome = ProcessExecutor(3).run(toys.ToyJob(tmp_path), toys.make_tiles(7, 3), recorder, StopFlag())
    assert (outcome.finished, outcome.failures, outcome.stopped) == (7, (), False)
    assert recorder.done == list(range(7))
    assert {(tmp_path / f"tries-{tile}").read_text() for tile in range(7)} == {"x"}
    weights = np.arange(9.0).reshape(3, 3)
    np.testing.assert_array_equal(np.load(tmp_path / "tile-6.npy"), weights @ weights * 6)
    assert [(path.name, path.read_text()) for path in tmp_path.glob("opened-*")] == [("opened-0", "cpu 1")]
    assert (tmp_path / "closed-0").exists()
    assert not psutil.Process().children()


def test_two_tiles_are_under_way_together_in_processes_of_their_own(tmp_path: Path) -> None:
    class Worker(toys.ToyWorker):
        def compute(self, tile: Tile, split: int = 0) -> TileRecord:
            (tmp_path / f"pid-{tile.index}").write_text(str(os.getpid()))
            wait_until((tmp_path / f"pid-{1 - tile.index}").exists)
            return super().compute(tile, split)

    outcome = ProcessExecutor(2).run(JobOf(tmp_path, Worker), toys.make_tiles(2, 2), toys.Recorder(), StopFlag())
    assert outcome.finished == 2, "each tile waits for the other one to be computed at the same time"
    pids = {path.read_text() for path in tmp_path.glob("pid-*")}
    assert len(pids | {str(os.getpid())}) == 3


def test_a_tile_is_tried_three_times_and_the_rest_goes_on(tmp_path: Path) -> None:
    recorder = toys.Recorder()
    job = toys.ToyJob(tmp_path, {0: "raise", 1: "raise once", 2: "memory", 3: "exit once", 4: "exit"})
    outcome = ProcessExecutor(2).run(job, toys.make_tiles(8, 2), recorder, StopFlag())
    assert recorder.done == [1, 3, 5, 6, 7]
    assert [tile for tile, _ in outcome.failures] == [0, 2, 4]
    assert "the process of its worker died" in dict(outcome.failures)[4]
    assert (tmp_path / "tries-4").read_text() == "xxx"
    assert (recorder.end.finished, recorder.end.failed, recorder.end.stopped) == (5, 3, False)
    assert not psutil.Process().children()


def test_memory_splits_a_tile(tmp_path: Path) -> None:
    job = toys.ToyJob(tmp_path, {1: "memory until 2"})
    outcome = ProcessExecutor(2).run(job, toys.make_tiles(4), toys.Recorder(), StopFlag())
    assert (outcome.finished, outcome.failures, outcome.split) == (4, (), 1)


def test_the_memory_that_a_child_takes_for_itself_is_measured(tmp_path: Path) -> None:
    shared = np.ones(1 << 25)

    class Worker(toys.ToyWorker):
        def compute(self, tile: Tile, split: int = 0) -> TileRecord:
            own = np.ones(1 << 24) if tile.index else shared
            return dataclasses.replace(super().compute(tile, split), seconds=float(own[-1]))

    recorder = toys.Recorder()
    ProcessExecutor(1).run(JobOf(tmp_path, Worker), toys.make_tiles(2), recorder, StopFlag())
    first, second = (event.record.peak_bytes for event in recorder.events if isinstance(event, TileDone))
    # Pages of libraries that a child reads count as its own; how many depends on what else its parent has loaded.
    assert first < shared.nbytes
    assert 120 << 20 <= second - first < 200 << 20


def test_that_the_kernel_ended_a_child_for_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    kills = iter([3, 3, 4, 4])
    monkeypatch.setattr(forked, "oom_kills", lambda: next(kills))
    inquest = forked.Inquest()
    found = [inquest.hold() for _ in range(3)]
    assert [failure.memory for failure in found] == [False, True, False]
    assert "ran out of memory" in found[1].message


def test_where_no_child_lives_long_all_is_given_up(tmp_path: Path) -> None:
    recorder = toys.Recorder()
    job = toys.ToyJob(tmp_path, dict.fromkeys(range(20), "exit"))
    outcome = ProcessExecutor(2).run(job, toys.make_tiles(20, 2), recorder, StopFlag())
    assert outcome.finished == 0
    assert len(outcome.failures) == 20
    tries = sum(path.stat().st_size for path in tmp_path.glob("tries-*"))
    assert tries == 2 + process_executor._LOSSES
    assert "no worker is left" in outcome.failures[-1][1]


def test_no_room_for_a_process_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    with pytest.raises(ExecutionError, match=r"No process could be forked: .*temporarily unavailable.*threads"):
        ProcessExecutor(2).run(toys.ToyJob(tmp_path), toys.make_tiles(2), toys.Recorder(), StopFlag())


def test_an_interrupt_kills_what_is_under_way(tmp_path: Path) -> None:
    class Worker(toys.ToyWorker):
        def compute(self, tile: Tile, split: int = 0) -> TileRecord:
            if tile.index:
                (tmp_path / "endless").touch()
                time.sleep(600)
            wait_until((tmp_path / "endless").exists)
            return super().compute(tile, split)

    class Impatient(toys.Recorder):
        def notify(self, event: Any) -> None:
            super().notify(event)
            if self.done:
                raise KeyboardInterrupt

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        ProcessExecutor(2).run(JobOf(tmp_path, Worker), toys.make_tiles(2, 2), Impatient(), StopFlag())
    assert time.monotonic() - begin < 60
    assert not psutil.Process().children()


SCRIPT = """
import sys, time
sys.path[:0] = [{here!r}, {root!r}]
from pathlib import Path
import test_processes as t
from disthess.execute.process_executor import ProcessExecutor
from disthess.execute.signals import stop_on_signals

folder = Path({folder!r})

class Worker(t.toys.ToyWorker):
    def compute(self, tile, split=0):
        (folder / f"pid-{{tile.index}}").write_text(str(t.os.getpid()))
        t.wait_until((folder / "go").exists, 60)
        return super().compute(tile, split)

with stop_on_signals() as stop:
    outcome = ProcessExecutor(2).run(t.JobOf(folder, Worker), t.toys.make_tiles(40, 2), t.toys.Recorder(), stop)
(folder / "outcome").write_text(f"{{outcome.finished}} {{outcome.stopped}}")
"""


def started(folder: Path) -> subprocess.Popen[bytes]:
    """A run in a process group of its own, with two tiles under way."""
    here = Path(__file__).parent
    script = SCRIPT.format(here=str(here), root=str(here.parents[2]), folder=str(folder))
    run = subprocess.Popen([sys.executable, "-W", "ignore", "-c", script], start_new_session=True)
    wait_until(lambda: len([path for path in folder.glob("pid-*") if path.read_text()]) == 2, 60)
    return run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_lets_tiles_under_way_finish(number: signal.Signals, tmp_path: Path) -> None:
    run = started(tmp_path)
    os.killpg(run.pid, number)
    time.sleep(0.2)
    (tmp_path / "go").touch()
    assert run.wait(60) == 0
    assert (tmp_path / "outcome").read_text() == "2 True"


def test_children_end_with_their_parent(tmp_path: Path) -> None:
    run = started(tmp_path)
    children = [psutil.Process(int(path.read_text())) for path in tmp_path.glob("pid-*")]
    run.kill()
    run.wait()
    gone, alive = psutil.wait_procs(children, timeout=30)
    assert (len(gone), alive) == (2, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 2}, r"one thread on the CPU, got threads=2.*'threads' or 'ray'"),
        ({"device": "cuda"}, r"on the CPU, got threads=None, device='cuda'"),
        ({"workers": 0}, "positive whole number"),
    ],
)
def test_what_cannot_be_forked_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        disthess.plan(small_problem(), executor="processes", **options)


def test_machines_that_cannot_fork_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="safe on Linux alone"):
        disthess.plan(small_problem(), executor="processes")


def test_object_stores_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"writes to a directory, got s3://bucket/run.zarr"):
        disthess.compute(small_problem(), "s3://bucket/run.zarr", executor="processes")


def test_the_plan_has_workers_of_one_thread() -> None:
    plan = disthess.plan(small_problem(), executor="processes", workers=5)
    assert (plan.workers, plan.threads) == (5, 1)


def test_a_model_that_autograd_differentiates_is_computed_too(tmp_path: Path) -> None:
    made = small_problem()
    store = disthess.compute(made, tmp_path / "run.zarr", executor="processes", workers=2, method="autograd")
    np.testing.assert_allclose(store.dense(), disthess.reference_hessian(made), atol=1e-12)
    assert {record.worker for record in store.store.records()} <= {0, 1}


def small_problem() -> disthess.Problem:
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()
    return disthess.Problem(model, loss="cross_entropy", batches=[(torch.randn(9, 5).double(), torch.arange(9) % 3)])
