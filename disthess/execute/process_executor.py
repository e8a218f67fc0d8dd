"""Workers as forked processes of this machine: the model is loaded once, and no two wait for one interpreter.

Threads of one process take the interpreter from each other between any two operations: where these are small, two take a third
longer over a tile than one alone. Processes do not. The arrays are those of a serial run with one thread.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import final

from typing_extensions import override

from disthess.errors import DisthessError, ExecutionError
from disthess.execute.attempt import Failure, describe
from disthess.execute.dispatch import Dispatcher
from disthess.execute.events import Listener, TileDone
from disthess.execute.executor import AbstractExecutor, RunOutcome, opened, outcome_of, reported
from disthess.execute.forked import Child, Inquest, first_ready
from disthess.execute.signals import StopFlag
from disthess.execute.task import AbstractJob, AbstractWorker
from disthess.store.layout import Tile, TileRecord

_LOSSES = 8
"""Children that are replaced between two tiles that are done."""


@final
class ProcessExecutor(AbstractExecutor):
    """Several tiles at a time, each in a process of its own. A tile that raises, or kills its process, is tried three times.

    Args:
        workers: Number of processes.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers

    @property
    @override
    def workers(self) -> int:
        return self._workers

    @override
    def run(self, job: AbstractJob, tiles: Sequence[Tile], listener: Listener, stop: StopFlag) -> RunOutcome:
        workers = max(1, min(self._workers, len(tiles)))
        dispatcher = Dispatcher(tiles, workers, halvings=job.halvings)
        with reported(dispatcher, tiles, workers, listener), opened(job, "cpu", 1) as worker:
            _Run(worker, dispatcher, listener, stop).drain(workers)
        return outcome_of(dispatcher, dispatcher.queued > 0)


@final
class _Run:
    """The loop: wait for answers, tell the dispatcher, hand out the next tile."""

    def __init__(self, worker: AbstractWorker, dispatcher: Dispatcher, listener: Listener, stop: StopFlag) -> None:
        self._worker = worker
        self._dispatcher = dispatcher
        self._listener = listener
        self._stop = stop
        self._inquest = Inquest()
        self._children: dict[int, Child] = {}
        self._busy: dict[Child, int] = {}
        self._spare = _LOSSES
        self._hopeless: DisthessError | None = None

    def drain(self, workers: int) -> None:
        """Until every tile is done or given up, or a stop was asked for and none is in flight.

        Raises:
            ExecutionError: No process could be forked.
            StoreError: The store cannot be written.
        """
        try:
            for number in range(workers):
                self._children[number] = self._fork()
            self._assign()
            while self._busy:
                for child in first_ready(self._busy):
                    number = self._busy.pop(child)
                    answer = child.answer()
                    if answer is None:
                        self._lose(number)
                    else:
                        self._note(number, answer)
                self._assign()
        finally:
            for child in self._children.values():
                child.end(at_once=child in self._busy)
        if self._hopeless is not None:
            raise self._hopeless

    def _fork(self) -> Child:
        try:
            return Child(self._worker)
        except OSError as error:
            raise ExecutionError(
                f"No process could be forked: {describe(error)}. What was done before is kept; executor='threads' needs none."
            ) from error

    def _assign(self) -> None:
        for number in sorted(set(self._children) - set(self._busy.values())):
            tile = None if self._stop.is_set or self._hopeless is not None else self._dispatcher.take(number)
            if tile is not None:
                child = self._children[number]
                child.ask(tile, self._dispatcher.split(tile))
                self._busy[child] = number

    def _note(self, number: int, answer: TileRecord | Failure) -> None:
        if not isinstance(answer, Failure):
            self._spare = _LOSSES
            tile = self._dispatcher.finish(number)
            self._listener.notify(TileDone(dataclasses.replace(answer, worker=number), tile))
            return
        if answer.hopeless is not None:
            self._hopeless = answer.hopeless
        self._listener.notify(self._dispatcher.fail(number, answer.message, answer.memory))

    def _lose(self, number: int) -> None:
        failure = self._inquest.hold()
        self._children.pop(number).end(at_once=True)
        event = self._dispatcher.lose(number, failure.message, failure.memory)
        if event is not None:
            self._listener.notify(event)
        if self._stop.is_set or self._hopeless is not None:
            return
        if self._spare > 0:
            self._spare -= 1
            self._children[number] = self._fork()
            self._dispatcher.revive(number)
        elif not self._children:
            for given_up in self._dispatcher.give_up(f"no worker is left; the last one: {failure.message}"):
                self._listener.notify(given_up)
