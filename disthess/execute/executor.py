"""The seam between what is computed and where: an executor runs a job over tiles."""

from __future__ import annotations

import abc
import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

from typing_extensions import override

from disthess.errors import DisthessError, ExecutionError
from disthess.execute.attempt import Failure, attempt_tile, failure_of
from disthess.execute.dispatch import Dispatcher
from disthess.execute.events import Listener, RunEnded, RunStarted, TileDone
from disthess.execute.signals import StopFlag
from disthess.execute.task import AbstractJob, AbstractWorker
from disthess.store.layout import Tile


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """How a run ended.

    Attributes:
        finished: Tiles computed.
        failures: (tile number, message) of those given up.
        stopped: Whether the stop flag ended it before all tiles were tried.
        split: Of the tiles computed, how many took smaller pieces because memory ran out.
    """

    finished: int
    failures: tuple[tuple[int, str], ...]
    stopped: bool
    split: int = 0


class AbstractExecutor(abc.ABC):
    """Runs a job over tiles; what it computes does not depend on which executor it is."""

    @property
    @abc.abstractmethod
    def workers(self) -> int:
        """Number of workers."""

    @abc.abstractmethod
    def run(self, job: AbstractJob, tiles: Sequence[Tile], listener: Listener, stop: StopFlag) -> RunOutcome:
        """Compute tiles, and tell the listener of each.

        Args:
            job: What to compute.
            tiles: In order; each owner computes its own in this order.
            listener: Told of every event in the calling thread; a tile is done when it is told.
            stop: Once set, tiles in flight are finished and no other is started.

        Raises:
            StoreError: The store cannot be written; tiles in flight were finished.
            ExecutionError: No worker could be started.
        """


def _started(tiles: Sequence[Tile], workers: int) -> RunStarted:
    return RunStarted(
        tiles=len(tiles),
        done_before=0,
        flops=sum(tile.flops for tile in tiles),
        written_bytes=sum(tile.written_bytes for tile in tiles),
        workers=workers,
    )


def _ended(dispatcher: Dispatcher, stopped: bool, seconds: float) -> RunEnded:
    return RunEnded(dispatcher.finished, len(dispatcher.failures), stopped, seconds, dispatcher.finished_split)


def outcome_of(dispatcher: Dispatcher, stopped: bool) -> RunOutcome:
    """How a run ended."""
    failures = tuple(sorted((event.tile.index, event.message) for event in dispatcher.failures))
    return RunOutcome(dispatcher.finished, failures, stopped, dispatcher.finished_split)


@final
class SerialExecutor(AbstractExecutor):
    """Tile by tile in this process. A tile that raises is tried once more at the end, then given up; see `Dispatcher`.

    Args:
        threads: Threads for linear algebra.
        device: Torch's name of the device.
    """

    def __init__(self, threads: int = 1, device: str = "cpu") -> None:
        self._threads = threads
        self._device = device

    @property
    @override
    def workers(self) -> int:
        return 1

    @override
    def run(self, job: AbstractJob, tiles: Sequence[Tile], listener: Listener, stop: StopFlag) -> RunOutcome:
        dispatcher = Dispatcher(tiles, 1, max_attempts=2, halvings=job.halvings)
        with reported(dispatcher, tiles, 1, listener), opened(job, self._device, self._threads) as worker:
            while not stop.is_set and (tile := dispatcher.take(0)) is not None:
                result = attempt_tile(worker, tile, dispatcher.split(tile))
                if not isinstance(result, Failure):
                    dispatcher.finish(0)
                    listener.notify(TileDone(result, tile))
                elif result.hopeless is not None:
                    raise result.hopeless
                else:
                    listener.notify(dispatcher.fail(0, result.message, result.memory))
        return outcome_of(dispatcher, dispatcher.queued > 0)


@contextlib.contextmanager
def reported(dispatcher: Dispatcher, tiles: Sequence[Tile], workers: int, listener: Listener) -> Iterator[None]:
    """Tell the listener that a run begins, and at the end, however it comes, how it went."""
    begin = time.perf_counter()
    listener.notify(_started(tiles, workers))
    try:
        yield
    finally:
        listener.notify(_ended(dispatcher, dispatcher.queued > 0, time.perf_counter() - begin))


@contextlib.contextmanager
def opened(job: AbstractJob, device: str, threads: int) -> Iterator[AbstractWorker]:
    """A worker in this process, closed in the end.

    Raises:
        ExecutionError: It cannot be opened, and why.
    """
    worker = _open(job, device, threads)
    try:
        yield worker
    finally:
        worker.close()


def _open(job: AbstractJob, device: str, threads: int) -> AbstractWorker:
    try:
        return job.open(job.weights, 0, device, threads)
    except DisthessError:
        raise
    except Exception as error:
        message = failure_of(error, None).message
        raise ExecutionError(f"No worker could be opened: {message}. What was done before is kept.") from error
