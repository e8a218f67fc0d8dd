"""Workers as threads of this process: they share the model, and each computes tiles of its own.

Small operations gain more from several tiles at a time than from several threads per operation, and while one tile is
written others are computed. The arrays are those of a serial run with as many threads per worker.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import final

from typing_extensions import override

from disthess.errors import DisthessError
from disthess.execute.attempt import Failure, attempt_tile
from disthess.execute.dispatch import Dispatcher
from disthess.execute.events import Listener, TileDone
from disthess.execute.executor import AbstractExecutor, RunOutcome, opened, outcome_of, reported
from disthess.execute.signals import StopFlag
from disthess.execute.task import AbstractJob, AbstractWorker
from disthess.store.layout import Tile, TileRecord

Attempt = Future[TileRecord | Failure]

SWITCH_SECONDS = 5e-4
"""After so long a thread that waits for the interpreter asks for it; Python's own is 5e-3, with which small tiles take 6 % more."""


@contextlib.contextmanager
def quick_switches() -> Iterator[None]:
    """Threads ask each other for the interpreter after `SWITCH_SECONDS`: a worker needs it for microseconds between two kernels."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, SWITCH_SECONDS))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@final
class ThreadExecutor(AbstractExecutor):
    """Several tiles at a time in this process. A tile that raises is tried once more at the end, then given up.

    Args:
        workers: Tiles computed at a time.
        threads: Threads for linear algebra, for each of them.
        device: Torch's name of the device.
    """

    def __init__(self, workers: int, threads: int = 1, device: str = "cpu") -> None:
        self._workers = workers
        self._threads = threads
        self._device = device

    @property
    @override
    def workers(self) -> int:
        return self._workers

    @override
    def run(self, job: AbstractJob, tiles: Sequence[Tile], listener: Listener, stop: StopFlag) -> RunOutcome:
        dispatcher = Dispatcher(tiles, self._workers, max_attempts=2, halvings=job.halvings)
        with (
            reported(dispatcher, tiles, self._workers, listener),
            opened(job, self._device, self._threads) as worker,
            quick_switches(),
            ThreadPoolExecutor(self._workers, thread_name_prefix="disthess-tile") as pool,
        ):
            self._drain(pool, worker, dispatcher, listener, stop)
        return outcome_of(dispatcher, dispatcher.queued > 0)

    def _drain(
        self,
        pool: ThreadPoolExecutor,
        worker: AbstractWorker,
        dispatcher: Dispatcher,
        listener: Listener,
        stop: StopFlag,
    ) -> None:
        running: dict[Attempt, int] = {}
        hopeless: DisthessError | None = None
        idle = set(range(self._workers))
        while True:
            for number in sorted(idle):
                tile = None if stop.is_set or hopeless is not None else dispatcher.take(number)
                if tile is not None:
                    running[pool.submit(attempt_tile, worker, tile, dispatcher.split(tile))] = number
                    idle.discard(number)
            if not running:
                break
            for attempt in wait(running, return_when=FIRST_COMPLETED).done:
                number = running.pop(attempt)
                idle.add(number)
                result, tile = attempt.result(), dispatcher.in_flight(number)
                if tile is None:
                    raise AssertionError("an attempt ended that nobody began")
                if not isinstance(result, Failure):
                    dispatcher.finish(number)
                    # Memory is measured for the process: each worker's share of it counts.
                    record = dataclasses.replace(result, worker=number, peak_bytes=result.peak_bytes // self._workers)
                    listener.notify(TileDone(record, tile))
                elif result.hopeless is not None:
                    hopeless = result.hopeless
                else:
                    listener.notify(dispatcher.fail(number, result.message, result.memory))
        if hopeless is not None:
            raise hopeless
