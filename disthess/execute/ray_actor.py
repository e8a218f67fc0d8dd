"""What runs inside a Ray actor: one worker, whose exceptions come back as values."""

from __future__ import annotations

import importlib
import socket
from collections.abc import Mapping
from typing import final

import numpy as np
import ray

from disthess.errors import ExecutionError
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

    def compute(self, tile: Tile, split: int) -> TileRecord | Failure:
        """One attempt at a tile, halved ``split`` times."""
        if self._worker is None:
            return Failure("the worker was asked for a tile before it was opened")
        return attempt_tile(self._worker, tile, split)

    def close(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.close()


def own_device(device: str | None) -> str:
    """The device of this process: as told, else the GPU that Ray has given it, else the CPU.

    Raises:
        ExecutionError: Ray counts a GPU here that torch does not see. Some workers on a GPU and some not would be neither fast
            nor the same bytes, so that is not passed over.
    """
    given = ray.get_gpu_ids()
    wanted = device if device is not None else ("cuda" if given else "cpu")
    # Only a worker with a GPU pays for loading torch here; its job loads it anyway.
    if wanted.startswith("cuda") and not importlib.import_module("torch").cuda.is_available():
        raise ExecutionError(
            f"Ray gave this worker GPU {', '.join(str(number) for number in given) or 'none'} of the machine "
            f"{socket.gethostname()}, but torch sees no GPU there. Declare only GPUs that exist ('ray start --num-gpus'), "
            f"install a torch built for them, or compute with device='cpu'."
        )
    return wanted
