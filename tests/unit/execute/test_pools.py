"""What threads and forked processes have in common: how a run of several tiles at a time ends."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import toy_job as toys

from disthess.errors import ExecutionError, StoreError
from disthess.execute.executor import AbstractExecutor
from disthess.execute.forked import why_not
from disthess.execute.process_executor import ProcessExecutor
from disthess.execute.signals import StopFlag
from disthess.execute.thread_executor import ThreadExecutor

Pool = Callable[[int], AbstractExecutor]

pytestmark = pytest.mark.parametrize(
    "pool",
    [ThreadExecutor, pytest.param(ProcessExecutor, marks=pytest.mark.skipif(bool(why_not()), reason="no forks here"))],
)


def test_a_full_disk_ends_the_run_and_tiles_in_flight_are_finished(pool: Pool, tmp_path: Path) -> None:
    recorder = toys.Recorder()
    job = toys.ToyJob(tmp_path, {0: "full", 1: "slow"})
    with pytest.raises(StoreError, match="No space"):
        pool(2).run(job, toys.make_tiles(40, 2), recorder, StopFlag())
    assert 1 in recorder.done
    assert recorder.end.stopped
    assert (tmp_path / "closed-0").exists()


def test_the_flag_stops_between_tiles(pool: Pool, tmp_path: Path) -> None:
    stop = StopFlag()

    class Stopper(toys.Recorder):
        def notify(self, event: object) -> None:
            super().notify(event)
            if len(self.done) == 2:
                stop.set()

    recorder = Stopper()
    outcome = pool(2).run(toys.ToyJob(tmp_path), toys.make_tiles(40, 2), recorder, stop)
    assert outcome.stopped
    assert 2 <= outcome.finished <= 4


def test_a_worker_that_does_not_open_is_one_clear_error(pool: Pool, tmp_path: Path) -> None:
    recorder = toys.Recorder()
    with pytest.raises(ExecutionError, match="could be opened: ValueError: no such model"):
        pool(2).run(toys.ToyJob(tmp_path, open_fault="no such model"), toys.make_tiles(2), recorder, StopFlag())
    assert recorder.end.finished == 0
