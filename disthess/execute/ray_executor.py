"""Tiles on Ray: one actor per worker, the dispatcher on the driver, data written by the actors themselves.

Ray is asked for processes and for shipping the weights, nothing else: actors are never restarted and calls never retried by
Ray, since only the driver knows which tile is worth another attempt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import ray
from typing_extensions import override

from disthess.errors import ExecutionError
from disthess.execute.dispatch import Dispatcher
from disthess.execute.events import Listener
from disthess.execute.executor import AbstractExecutor, RunOutcome, outcome_of, reported
from disthess.execute.ray_crew import Crew
from disthess.execute.ray_drive import Drive
from disthess.execute.ray_room import Share, actor_options
from disthess.execute.ray_session import Session, ray_session
from disthess.execute.signals import StopFlag
from disthess.execute.task import AbstractJob
from disthess.store.layout import Tile


@final
class RayExecutor(AbstractExecutor):
    """Actors that own tiles, spread over the nodes; a dead one's tiles go to the living, and a fresh one takes its place.

    At least one worker must fit into the cluster. Others that do not fit now, or are lost with their node, start when there is
    room: on a node that joins later, or where something else ends.

    Args:
        workers: Number of actors.
        threads: Threads of each.
        device: Torch's name of the device, ``cuda`` for the GPU that Ray gives each actor; None for that GPU where the cluster
            has any, else the CPU.
        address: Of a Ray cluster; None for the one this process is connected to, or else a private one.
        start_seconds: How long to wait where no actor is there.
        gpus: GPUs that each actor keeps to itself; None for one where it computes on a GPU, else none.
    """

    def __init__(
        self,
        workers: int,
        threads: int = 1,
        device: str | None = None,
        address: str | None = None,
        start_seconds: float = 300.0,
        gpus: int | None = None,
    ) -> None:
        if workers < 1 or threads < 1:
            raise ValueError(f"workers and threads must be positive, got {workers} and {threads}")
        if device is not None and device.startswith("cuda:"):
            raise ExecutionError(
                f"device {device!r} names one GPU, and with Ray each worker sees only the one that Ray gives it. Use "
                f"device='cuda' and as many workers as GPUs; CUDA_VISIBLE_DEVICES chooses among them when Ray is started."
            )
        self._workers = workers
        self._threads = threads
        self._device = device
        self._address = address
        self._start_seconds = start_seconds
        self._gpus = gpus

    @property
    @override
    def workers(self) -> int:
        return self._workers

    @override
    def run(self, job: AbstractJob, tiles: Sequence[Tile], listener: Listener, stop: StopFlag) -> RunOutcome:
        workers = max(1, min(self._workers, len(tiles)))
        dispatcher = Dispatcher(tiles, workers, halvings=job.halvings)
        weights = dict(job.weights)
        nbytes = sum(array.nbytes for array in weights.values())
        with reported(dispatcher, tiles, workers, listener), ray_session(self._address, workers, nbytes) as session:
            options = actor_options(session, self._share(session))
            crew = Crew(options, (ray.put(job), ray.put(weights)), self._device, self._threads)
            try:
                Drive(dispatcher, crew, listener, stop, self._start_seconds).run(workers)
            finally:
                crew.dismiss()
        return outcome_of(dispatcher, dispatcher.queued > 0)

    def _share(self, session: Session) -> Share:
        on_gpu = self._device == "cuda" if self._device is not None else session.gpus >= 1
        return Share(self._threads, self._gpus if self._gpus is not None else int(on_gpu))
