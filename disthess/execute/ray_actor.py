"""What runs inside a Ray actor: one worker, whose exceptions come back as values."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import final

import numpy as np
import ray

from disthess.execute.attempt import Failure, attempt_tile, failure_of
from disthess.execute.task import AbstractJob, AbstractWorker
from disthess.store.layout import Tile, TileRecord


@final
class TileActor:
    """Opened once, then asked for tile after tile. Ray makes an actor of it."""

    def __init__(self) -> None:
        self._worker: AbstractWorker | None = None

    def open(
        self, job: AbstractJob, weights: Mapping[str, np.ndarray], worker: int, device: str | None, threads: int
    ) -> Failure | None:
        """Load the problem; None if that went well."""
        try:
            self._worker = job.open(weights, worker, own_device(device), threads)
        except Exception as error:
            return failure_of(error, None)
        return None

    def compute(self, tile: Tile) -> TileRecord | Failure:
        """One attempt at a tile."""
        if self._worker is None:
            return Failure("the worker was asked for a tile before it was opened")
        return attempt_tile(self._worker, tile)

    def close(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.close()


def own_device(device: str | None) -> str:
    """The device of this process: as told, else the GPU that Ray has given it, if torch sees one, else the CPU."""
    if device is not None:
        return device
    if not ray.get_gpu_ids():
        return "cpu"
    # Only a worker with a GPU pays for loading torch here; its job loads it anyway.
    return "cuda" if importlib.import_module("torch").cuda.is_available() else "cpu"
