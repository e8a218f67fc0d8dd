"""Tiles on Ray: one actor per worker, the dispatcher on the driver, data written by the actors themselves.

Ray is asked for processes and for shipping the weights, nothing else: actors are never restarted and calls never retried by
Ray, since only the driver knows which tile is worth another attempt.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, final

import ray
from typing_extensions import override

from disthess.errors import ExecutionError
from disthess.execute.attempt import Failure
from disthess.execute.dispatch import Dispatcher
from disthess.execute.events import Listener, TileDone
from disthess.execute.executor import AbstractExecutor, RunOutcome, ended, outcome_of, started
from disthess.execute.ray_actor import TileActor
from disthess.execute.ray_session import Session, ray_session
from disthess.execute.signals import StopFlag
from disthess.execute.task import AbstractJob
from disthess.store.layout import Tile, TileRecord

_POLL_SECONDS = 0.25
_CLOSE_SECONDS = 3.0
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@final
class RayExecutor(AbstractExecutor):
    """Actors that own tiles; a dead one's tiles go to the living, and a fresh one takes its place.

    Args:
        workers: Number of actors.
        threads: Threads of each.
        device: Torch's name of the device; None for the GPU that Ray gives each actor, or the CPU where it has none.
        address: Of a Ray cluster; None for the one this process is connected to, or else a private one.
        start_seconds: How long to wait for the first actor.
    """

    def __init__(
        self,
        workers: int,
        threads: int = 1,
        device: str | None = None,
        address: str | None = None,
        start_seconds: float = 300.0,
    ) -> None:
        if workers < 1 or threads < 1:
            raise ValueError(f"workers and threads must be positive, got {workers} and {threads}")
        self._workers = workers
        self._threads = threads
        self._device = device
        self._address = address
        self._start_seconds = start_seconds

    @property
    @override
    def workers(self) -> int:
        return self._workers

    @override
    def run(self, job: AbstractJob, tiles: Sequence[Tile], listener: Listener, stop: StopFlag) -> RunOutcome:
        begin = time.perf_counter()
        workers = max(1, min(self._workers, len(tiles)))
        dispatcher = Dispatcher(tiles, workers)
        listener.notify(started(tiles, workers))
        weights = dict(job.weights)
        try:
            with ray_session(self._address, workers, sum(array.nbytes for array in weights.values())) as session:
                options = self._options(session, workers)
                crew = _Crew(options, (ray.put(job), ray.put(weights)), self._device, self._threads)
                try:
                    _Drive(dispatcher, crew, listener, stop, self._start_seconds).run(workers)
                finally:
                    crew.dismiss()
        finally:
            listener.notify(ended(dispatcher, dispatcher.queued > 0, time.perf_counter() - begin))
        return outcome_of(dispatcher, dispatcher.queued > 0)

    def _options(self, session: Session, workers: int) -> dict[str, Any]:
        wants_gpu = self._device.startswith("cuda") if self._device is not None else session.gpus >= workers
        # All of a private Ray is ours; elsewhere cores are claimed, so that other work is not crowded.
        cpus = 0 if session.private else self._threads
        if cpus * workers > session.cpus or (wants_gpu and workers > session.gpus):
            raise ExecutionError(
                f"{workers} workers with {self._threads} threads{' and a GPU' if wants_gpu else ''} each do not fit into "
                f"this Ray cluster, which has {session.cpus:.0f} cores and {session.gpus:.0f} GPUs. Use fewer workers or "
                f"threads, or a larger cluster."
            )
        variables = {name: str(self._threads) for name in _THREAD_VARIABLES}
        if session.private:
            # On this machine workers import what the driver can import, wherever it found it.
            variables["PYTHONPATH"] = os.pathsep.join(os.path.abspath(place) for place in sys.path)
        return {
            "num_cpus": cpus,
            "num_gpus": 1 if wants_gpu else 0,
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": 1,
            "runtime_env": {"env_vars": variables},
        }


@final
class _Crew:
    """The actors, by worker number."""

    def __init__(self, options: dict[str, Any], shipped: tuple[Any, Any], device: str | None, threads: int) -> None:
        self._make = ray.remote(TileActor).options(**options)
        self._shipped = shipped
        self._device = device
        self._threads = threads
        self._actors: dict[int, Any] = {}

    def start(self, worker: int) -> Any:
        """A fresh actor for a worker; the answer to its opening."""
        actor: Any = self._make.remote()
        self._actors[worker] = actor
        job, weights = self._shipped
        return actor.open.remote(job, weights, worker, self._device, self._threads)

    def compute(self, worker: int, tile: Tile) -> Any:
        """The answer to come for a tile."""
        return self._actors[worker].compute.remote(tile)

    def forget(self, worker: int) -> None:
        """End an actor that is of no more use."""
        with contextlib.suppress(Exception):
            ray.kill(self._actors.pop(worker))

    def dismiss(self) -> None:
        """Close and end all actors; those that are busy are ended without closing."""
        closing = []
        with contextlib.suppress(Exception):
            closing = [actor.close.remote() for actor in self._actors.values()]
            ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_SECONDS)
        for worker in tuple(self._actors):
            self.forget(worker)


@final
class _Drive:
    """The driver's loop: waits for answers, tells the dispatcher, hands out the next tile."""

    def __init__(
        self, dispatcher: Dispatcher, crew: _Crew, listener: Listener, stop: StopFlag, start_seconds: float
    ) -> None:
        self._dispatcher = dispatcher
        self._crew = crew
        self._listener = listener
        self._stop = stop
        self._answers: dict[Any, int] = {}
        self._opening: set[int] = set()
        self._opened = False
        self._spare = 8
        self._hopeless: Failure | None = None
        self._deadline = time.monotonic() + start_seconds

    def run(self, workers: int) -> None:
        """Until every tile is finished or given up, or a stop was asked for and none is in flight."""
        for worker in range(workers):
            self._start(worker)
        while self._answers:
            if self._halting and all(worker in self._opening for worker in self._answers.values()):
                break
            ready, _ = ray.wait(list(self._answers), num_returns=1, timeout=_POLL_SECONDS)
            if not ready and not self._opened and time.monotonic() > self._deadline:
                raise ExecutionError(
                    "Ray did not start a worker in time. Look at 'ray status' and the logs of the cluster; it may lack "
                    "the cores or GPUs that the workers ask for."
                )
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
            result = Failure(death_message(error))
        except ray.exceptions.RayError as error:
            self._lose(worker, death_message(error))
            return
        if was_opening and isinstance(result, Failure):
            self._lose(worker, result.message, result)
            return
        if was_opening:
            self._opened = True
        else:
            self._note(worker, result)
        self._assign()

    def _note(self, worker: int, result: TileRecord | Failure) -> None:
        if not isinstance(result, Failure):
            self._listener.notify(TileDone(result, self._dispatcher.finish(worker)))
            return
        if result.hopeless is not None:
            self._hopeless = result
        self._listener.notify(self._dispatcher.fail(worker, result.message))

    def _assign(self) -> None:
        for worker in sorted(self._idle()):
            tile = None if self._halting else self._dispatcher.take(worker)
            if tile is not None:
                self._answers[self._crew.compute(worker, tile)] = worker

    def _idle(self) -> set[int]:
        return set(self._dispatcher.alive) - set(self._answers.values())

    def _lose(self, worker: int, message: str, failure: Failure | None = None) -> None:
        self._crew.forget(worker)
        event = self._dispatcher.lose(worker, message)
        if event is not None:
            self._listener.notify(event)
        if failure is not None and failure.hopeless is not None:
            self._hopeless = failure
        if self._halting:
            return
        # A worker that cannot be opened is not tried again and again: nothing suggests that it would go better.
        if failure is None and self._spare > 0 and self._dispatcher.queued:
            self._spare -= 1
            self._dispatcher.revive(worker)
            self._start(worker)
        self._assign()
        if not self._dispatcher.alive and not self._opened:
            raise ExecutionError(f"No worker could be opened: {message}. What was done before is kept.")
        if not self._dispatcher.alive:
            for given_up in self._dispatcher.give_up(f"no worker is left; the last one: {message}"):
                self._listener.notify(given_up)


def death_message(error: Exception) -> str:
    """Why an actor died, in a sentence; Ray's own texts run over pages."""
    text = str(error)
    if isinstance(error, ray.exceptions.OutOfMemoryError) or "OutOfMemory" in text or "memory on the node" in text:
        return (
            "its worker was ended because the machine ran out of memory; use fewer workers or a smaller memory budget"
        )
    if isinstance(error, ray.exceptions.ActorUnavailableError):
        return "its worker can no longer be reached"
    if isinstance(error, ray.exceptions.RayTaskError):
        return f"its worker raised {text.strip().splitlines()[-1][:300]}"
    if "node" in text.lower() and "died" in text.lower() and "actor died because its node" in text.lower():
        return "the machine of its worker is gone"
    return "the process of its worker died (killed, crashed, or out of memory)"
