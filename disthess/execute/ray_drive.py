"""The driver's loop over Ray actors: wait for answers, tell the dispatcher, hand out the next tile.

Every worker that was asked for is an actor from the start. Those that Ray has no room for wait with Ray, which starts them when
a node joins or a GPU comes free; tiles of the others go on meanwhile. A lost actor is replaced in the same way.
"""

from __future__ import annotations

import time
from typing import Any, final

import ray

from disthess.errors import ExecutionError
from disthess.execute.attempt import Failure
from disthess.execute.dispatch import Dispatcher
from disthess.execute.events import Listener, TileDone, WorkersChanged
from disthess.execute.ray_crew import Coroner, Crew
from disthess.execute.signals import StopFlag
from disthess.store.layout import TileRecord

_POLL_SECONDS = 0.25
_LOSSES_IN_A_ROW = 8


@final
class Drive:
    """One run's loop.

    Args:
        dispatcher: State of the tiles.
        crew: The actors.
        listener: Told of every event.
        stop: Once set, no other tile is started.
        start_seconds: How long to wait where no worker is there.
    """

    def __init__(
        self, dispatcher: Dispatcher, crew: Crew, listener: Listener, stop: StopFlag, start_seconds: float
    ) -> None:
        self._dispatcher = dispatcher
        self._crew = crew
        self._listener = listener
        self._stop = stop
        self._coroner = Coroner()
        self._answers: dict[Any, int] = {}
        self._opening: set[int] = set()
        self._working: set[int] = set()
        self._wanted = 0
        self._opened = False
        self._spare = _LOSSES_IN_A_ROW
        self._hopeless: Failure | None = None
        self._start_seconds = start_seconds
        self._deadline = 0.0

    def run(self, workers: int) -> None:
        """Until every tile is finished or given up, or a stop was asked for and none is in flight.

        Raises:
            ExecutionError: No worker could be started.
            StoreError: The store cannot be written.
        """
        self._wanted = workers
        self._deadline = time.monotonic() + self._start_seconds
        for worker in range(workers):
            self._start(worker)
        while self._answers and not self._dispatcher.settled:
            if self._halting and all(worker in self._opening for worker in self._answers.values()):
                break
            ready, _ = ray.wait(list(self._answers), num_returns=1, timeout=_POLL_SECONDS)
            if self._working:
                self._deadline = time.monotonic() + self._start_seconds
            if not ready and time.monotonic() > self._deadline:
                self._despair()
            for answer in ready:
                self._take_answer(answer)
        if self._hopeless is not None and self._hopeless.hopeless is not None:
            raise self._hopeless.hopeless

    @property
    def _halting(self) -> bool:
        return self._stop.is_set or self._hopeless is not None

    def _start(self, worker: int) -> None:
        self._opening.add(worker)
        self._answers[self._crew.start(worker)] = worker

    def _take_answer(self, answer: Any) -> None:
        worker = self._answers.pop(answer)
        was_opening = worker in self._opening
        self._opening.discard(worker)
        try:
            result = ray.get(answer)
        except ray.exceptions.RayTaskError as error:
            result = self._coroner.examine(error)
        except ray.exceptions.RayError as error:
            self._lose(worker, self._coroner.examine(error), replace=True)
            return
        if was_opening and isinstance(result, Failure):
            # A worker that cannot be opened is not tried again and again: nothing suggests that it would go better.
            self._lose(worker, result, replace=False)
            return
        if was_opening:
            self._opened = True
            self._working.add(worker)
            self._tell_workers()
        else:
            self._note(worker, result)
        self._assign()

    def _note(self, worker: int, result: TileRecord | Failure) -> None:
        if not isinstance(result, Failure):
            self._spare = _LOSSES_IN_A_ROW
            self._listener.notify(TileDone(result, self._dispatcher.finish(worker)))
            return
        if result.hopeless is not None:
            self._hopeless = result
        self._listener.notify(self._dispatcher.fail(worker, result.message, result.memory))

    def _assign(self) -> None:
        for worker in sorted(self._idle()):
            tile = None if self._halting else self._dispatcher.take(worker)
            if tile is not None:
                self._answers[self._crew.compute(worker, tile, self._dispatcher.split(tile))] = worker

    def _idle(self) -> set[int]:
        return self._working - set(self._answers.values())

    def _lose(self, worker: int, failure: Failure, *, replace: bool) -> None:
        self._crew.forget(worker)
        event = self._dispatcher.lose(worker, failure.message, failure.memory)
        if event is not None:
            self._listener.notify(event)
        if worker in self._working:
            self._working.discard(worker)
            self._tell_workers()
        if failure.hopeless is not None:
            self._hopeless = failure
        if self._halting:
            return
        if replace and self._spare > 0 and self._dispatcher.queued:
            self._spare -= 1
            self._dispatcher.revive(worker)
            self._start(worker)
        self._assign()
        if not self._dispatcher.alive:
            self._despair(failure.message)

    def _tell_workers(self) -> None:
        self._listener.notify(WorkersChanged(len(self._working), self._wanted))

    def _despair(self, message: str = "") -> None:
        """There is no worker, and none will come."""
        if not self._opened and message:
            raise ExecutionError(f"No worker could be opened: {message}. What was done before is kept.")
        if not self._opened:
            raise ExecutionError(
                "Ray did not start a worker in time. Look at 'ray status' and the logs of the cluster; it may lack "
                "the cores or GPUs that the workers ask for."
            )
        why = f"the last one: {message}" if message else f"Ray found no room for one in {self._start_seconds:.0f} s"
        for given_up in self._dispatcher.give_up(f"no worker is left; {why}"):
            self._listener.notify(given_up)
