"""Workers as threads: the same contract as the serial executor, several tiles at a time."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import toy_job as toys

from disthess.execute.signals import StopFlag
from disthess.execute.thread_executor import ThreadExecutor
from disthess.store.layout import Tile, TileRecord


def test_every_tile_is_computed_once_by_one_opened_job(tmp_path: Path) -> None:
    recorder = toys.Recorder()
    outcome = ThreadExecutor(3, 1).run(toys.ToyJob(tmp_path), toys.make_tiles(7, 3), recorder, StopFlag())
    assert (outcome.finished, outcome.failures, outcome.stopped) == (7, (), False)
    assert sorted(recorder.done) == list(range(7))
    assert {(tmp_path / f"tries-{tile}").read_text() for tile in range(7)} == {"x"}
    weights = np.arange(9.0).reshape(3, 3)
    np.testing.assert_array_equal(np.load(tmp_path / "tile-6.npy"), weights @ weights * 6)
    assert [path.name for path in tmp_path.glob("opened-*")] == ["opened-0"]
    assert (tmp_path / "closed-0").exists()


def test_two_tiles_are_under_way_together(tmp_path: Path) -> None:
    meeting = threading.Barrier(2, timeout=20)

    class Worker(toys.ToyWorker):
        def compute(self, tile: Tile, split: int = 0) -> TileRecord:
            meeting.wait()
            return super().compute(tile, split)

    class Job(toys.ToyJob):
        def open(self, weights: object, worker: int, device: str, threads: int) -> Worker:
            return Worker(tmp_path, self.weights, worker, {})

    outcome = ThreadExecutor(2).run(Job(tmp_path), toys.make_tiles(4, 2), toys.Recorder(), StopFlag())
    assert outcome.finished == 4, "each tile waits for another one to be computed at the same time"


def test_a_tile_is_tried_twice_and_the_rest_goes_on(tmp_path: Path) -> None:
    recorder = toys.Recorder()
    job = toys.ToyJob(tmp_path, {0: "raise", 1: "raise once", 2: "memory"})
    outcome = ThreadExecutor(2).run(job, toys.make_tiles(6, 2), recorder, StopFlag())
    assert sorted(recorder.done) == [1, 3, 4, 5]
    assert [tile for tile, _ in outcome.failures] == [0, 2]
    assert (recorder.end.finished, recorder.end.failed, recorder.end.stopped) == (4, 2, False)


def test_threads_of_linear_algebra_are_put_back() -> None:
    from disthess.execute.tile_job import DeviceSettings

    before = torch.get_num_threads()
    settings = DeviceSettings("cpu", before + 1)
    seen: list[int] = []
    thread = threading.Thread(target=lambda: (settings.enter_thread(), seen.append(torch.get_num_threads())))
    thread.start()
    thread.join()
    settings.restore()
    assert (seen, torch.get_num_threads()) == ([before + 1], before)


def test_the_interpreter_goes_quickly_from_thread_to_thread_and_as_before_afterwards(tmp_path: Path) -> None:
    before, seen = sys.getswitchinterval(), []

    class Worker(toys.ToyWorker):
        def compute(self, tile: Tile, split: int = 0) -> TileRecord:
            seen.append(sys.getswitchinterval())
            return super().compute(tile, split)

    class Job(toys.ToyJob):
        def open(self, weights: object, worker: int, device: str, threads: int) -> Worker:
            return Worker(tmp_path, self.weights, worker, {})

    ThreadExecutor(2).run(Job(tmp_path), toys.make_tiles(2, 2), toys.Recorder(), StopFlag())
    assert seen == pytest.approx([5e-4, 5e-4], rel=1e-2)
    assert sys.getswitchinterval() == before
