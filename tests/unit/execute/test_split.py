"""Tiles that run out of memory: tried again in smaller pieces, counted apart from failures, and told."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import toy_job as toys

from disthess.errors import SecondDerivativeError
from disthess.execute.attempt import failure_of
from disthess.execute.dispatch import Dispatcher
from disthess.execute.events import RunEnded, TileDone
from disthess.execute.executor import AbstractExecutor, SerialExecutor
from disthess.execute.progress import describe_end, describe_failure
from disthess.execute.signals import StopFlag
from disthess.execute.thread_executor import ThreadExecutor


@pytest.mark.parametrize("executor", [SerialExecutor(), ThreadExecutor(2)], ids=["serial", "threads"])
def test_a_tile_is_halved_until_it_fits_and_the_rest_stays_whole(executor: AbstractExecutor, tmp_path: Path) -> None:
    recorder = toys.Recorder()
    job = toys.ToyJob(tmp_path, {1: "memory until 2"})
    outcome = executor.run(job, toys.make_tiles(4), recorder, StopFlag())
    assert (outcome.finished, outcome.failures, outcome.split) == (4, (), 1)
    splits = {event.tile.index: event.record.split for event in recorder.events if isinstance(event, TileDone)}
    assert splits == {0: 0, 1: 2, 2: 0, 3: 0}
    assert [(event.split, event.attempts, event.final) for event in recorder.failed] == [(1, 0, False), (2, 0, False)]
    assert "will be tried again in smaller pieces, halved 1 time): the worker ran out of memory" in describe_failure(
        recorder.failed[0]
    )
    assert "1 split for memory" in describe_end(recorder.end)


def test_where_there_are_no_smaller_pieces_attempts_are_counted() -> None:
    dispatcher = Dispatcher(toys.make_tiles(1), 1, max_attempts=2, halvings=lambda tile: 2)
    seen = []
    while dispatcher.take(0) is not None:
        event = dispatcher.fail(0, "no memory", memory=True)
        seen.append((event.split, event.attempts, event.final))
    assert seen == [(1, 0, False), (2, 0, False), (0, 1, False), (0, 2, True)]


def test_a_death_for_memory_splits_and_another_does_not() -> None:
    dispatcher = Dispatcher(toys.make_tiles(1), 2, halvings=lambda tile: 2)
    tile = dispatcher.take(0)
    assert tile is not None
    dispatcher.lose(0, "killed")
    assert dispatcher.split(tile) == 0
    dispatcher.take(1)
    dispatcher.lose(1, "no memory", memory=True)
    assert dispatcher.split(tile) == 1


def test_an_end_without_splits_says_nothing_of_them() -> None:
    assert "split" not in describe_end(RunEnded(3, 0, False, 1.0))


def test_want_of_memory_is_recognised_in_its_disguises() -> None:
    with pytest.raises(RuntimeError) as allocation:
        torch.empty(1 << 60)
    wrapped = SecondDerivativeError("torch cannot")
    wrapped.__cause__ = allocation.value
    for error in (allocation.value, wrapped, MemoryError(), OSError(12, "Cannot allocate memory")):
        assert failure_of(error, None).memory, error
    for error in (RuntimeError("shapes"), OSError(28, "No space left on device"), ValueError("memory")):
        assert not failure_of(error, None).memory, error
