from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from disthess.errors import ExecutionError, StoreError
from disthess.execute.events import RunStarted, TileDone
from disthess.execute.executor import SerialExecutor
from disthess.execute.signals import StopFlag


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


def test_all_tiles_are_computed_in_order_and_told(tmp_path: Path) -> None:
    recorder = toys.Recorder()
    outcome = SerialExecutor(3, "cpu").run(toys.ToyJob(tmp_path), toys.make_tiles(4), recorder, StopFlag())
    assert (outcome.finished, outcome.failures, outcome.stopped) == (4, (), False)
    assert recorder.events[0] == RunStarted(tiles=4, done_before=0, flops=40, written_bytes=32, workers=1)
    assert [event.tile.index for event in recorder.events if isinstance(event, TileDone)] == [0, 1, 2, 3]
    weights = np.arange(9.0).reshape(3, 3)
    np.testing.assert_array_equal(np.load(tmp_path / "tile-3.npy"), weights @ weights * 3)
    assert (tmp_path / "opened-0").read_text() == "cpu 3"
    assert (tmp_path / "closed-0").exists()


def test_a_tile_is_tried_twice_and_the_rest_goes_on(tmp_path: Path) -> None:
    recorder = toys.Recorder()
    job = toys.ToyJob(tmp_path, {0: "raise", 1: "raise once", 2: "memory"})
    outcome = SerialExecutor().run(job, toys.make_tiles(5), recorder, StopFlag())
    assert recorder.done == [1, 3, 4]
    assert [tile for tile, _ in outcome.failures] == [0, 2]
    assert outcome.failures[0][1].startswith("ArithmeticError: tile 0 does not work (in compute, ")
    assert "not shown" not in outcome.failures[0][1]
    assert "ran out of memory" in outcome.failures[1][1]
    assert [(event.tile.index, event.attempts, event.final) for event in recorder.failed] == [
        (0, 1, False),
        (1, 1, False),
        (2, 1, False),
        (0, 2, True),
        (2, 2, True),
    ]
    assert (recorder.end.finished, recorder.end.failed, recorder.end.stopped) == (3, 2, False)


def test_a_full_disk_ends_the_run_at_once(tmp_path: Path) -> None:
    recorder = toys.Recorder()
    with pytest.raises(StoreError, match="No space"):
        SerialExecutor().run(toys.ToyJob(tmp_path, {1: "full"}), toys.make_tiles(4), recorder, StopFlag())
    assert recorder.done == [0]
    assert recorder.end.stopped
    assert (tmp_path / "closed-0").exists()


def test_the_flag_stops_between_tiles(tmp_path: Path) -> None:
    stop = StopFlag()

    class Stopper(toys.Recorder):  # type: ignore[misc]
        def notify(self, event: object) -> None:
            super().notify(event)
            if len(self.done) == 2:
                stop.set()

    recorder = Stopper()
    outcome = SerialExecutor().run(toys.ToyJob(tmp_path), toys.make_tiles(5), recorder, stop)
    assert (outcome.finished, outcome.stopped) == (2, True)
    assert recorder.done == [0, 1]


def test_a_worker_that_does_not_open_is_one_clear_error(tmp_path: Path) -> None:
    recorder = toys.Recorder()
    job = toys.ToyJob(tmp_path, open_fault="no such model")
    with pytest.raises(ExecutionError, match="could be opened: ValueError: no such model"):
        SerialExecutor().run(job, toys.make_tiles(2), recorder, StopFlag())
    assert recorder.end.finished == 0, "a listener with a bar must hear of the end"
