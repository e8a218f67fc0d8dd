"""The Ray actors of a run, by worker number, and why one of them died."""

from __future__ import annotations

import contextlib
from typing import Any, final

import ray

from disthess.execute.attempt import Failure, death
from disthess.execute.memory import oom_kills
from disthess.execute.ray_actor import TileActor
from disthess.store.layout import Tile

_CLOSE_SECONDS = 3.0


@final
class Crew:
    """Starts actors, asks them for tiles, ends them.

    Args:
        options: Of each actor, for Ray.
        shipped: References to job and weights.
        device: As the executor was told.
        threads: Of each.
    """

    def __init__(self, options: dict[str, Any], shipped: tuple[Any, Any], device: str | None, threads: int) -> None:
        self._make = ray.remote(TileActor).options(**options)
        self._shipped = shipped
        self._device = device
        self._threads = threads
        self._actors: dict[int, Any] = {}

    def start(self, worker: int) -> Any:
        """A fresh actor for a worker; the answer to its opening, which comes once Ray has found room for it."""
        actor: Any = self._make.remote()
        self._actors[worker] = actor
        job, weights = self._shipped
        return actor.open.remote(job, weights, worker, self._device, self._threads)

    def compute(self, worker: int, tile: Tile, split: int) -> Any:
        """The answer to come for a tile, halved ``split`` times."""
        return self._actors[worker].compute.remote(tile, split)

    def forget(self, worker: int) -> None:
        """End an actor that is of no more use."""
        with contextlib.suppress(Exception):
            ray.kill(self._actors.pop(worker))

    def dismiss(self) -> None:
        """Close and end all actors; those that are busy, or not there yet, are ended without closing."""
        closing = []
        with contextlib.suppress(Exception):
            closing = [actor.close.remote() for actor in self._actors.values()]
            ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_SECONDS)
        for worker in tuple(self._actors):
            self.forget(worker)


@final
class Coroner:
    """Says why an actor died; Ray's own texts run over pages.

    The kernel ends a process without a word. That it was for memory is concluded from its count of such ends, which can be
    read on the driver's machine alone; on others Ray's memory monitor acts before the kernel does, and says so.
    """

    def __init__(self) -> None:
        self._kills = oom_kills()

    def examine(self, error: Exception) -> Failure:
        """Why, in a sentence, and whether memory ran out."""
        text, kills = str(error), oom_kills()
        died = isinstance(error, ray.exceptions.RayActorError | ray.exceptions.WorkerCrashedError)
        by_kernel, self._kills = died and kills > self._kills, kills
        if by_kernel or _names_memory(error, text):
            return death(memory=True)
        if isinstance(error, ray.exceptions.ActorUnavailableError):
            return Failure("its worker can no longer be reached")
        if isinstance(error, ray.exceptions.RayTaskError):
            return Failure(f"its worker raised {text.strip().splitlines()[-1][:300]}")
        lower = text.lower()
        if "actor died because its node" in lower or ("node" in lower and "terminated" in lower):
            return Failure("the machine of its worker is gone")
        return death(memory=False)


def _names_memory(error: Exception, text: str) -> bool:
    return isinstance(error, ray.exceptions.OutOfMemoryError) or "OutOfMemory" in text or "memory on the node" in text
