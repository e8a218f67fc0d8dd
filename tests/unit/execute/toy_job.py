"""Jobs without a model: files of matrix products, and workers that fail as they are told."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from disthess.errors import StoreError
from disthess.execute.events import Event, RunEnded, TileDone, TileFailed
from disthess.execute.task import AbstractJob, AbstractWorker
from disthess.store.layout import Tile, TileRecord
from disthess.types import Span


def make_tiles(count: int, workers: int = 1) -> tuple[Tile, ...]:
    return tuple(Tile(i, f"s{i}", Span(i, i + 1), 0, i % workers, 10, 8, 0) for i in range(count))


class ToyWorker(AbstractWorker):
    """Writes ``weights @ weights * tile`` into a file; ``faults`` maps a tile to what goes wrong."""

    def __init__(self, folder: Path, weights: Mapping[str, np.ndarray], worker: int, faults: Mapping[int, str]) -> None:
        self._folder = folder
        self._weights = weights["w"]
        self._worker = worker
        self._faults = faults

    def compute(self, tile: Tile, split: int = 0) -> TileRecord:
        with (self._folder / f"tries-{tile.index}").open("a") as file:
            file.write("x")
        tries = (self._folder / f"tries-{tile.index}").stat().st_size
        fault = self._faults.get(tile.index, "")
        if fault == "exit" or (fault == "exit once" and tries == 1):
            os._exit(7)
        if fault == "raise" or (fault == "raise once" and tries == 1):
            raise ArithmeticError(f"tile {tile.index} does not work\nand this line is not shown")
        if fault == "full":
            raise StoreError("No space is left on the disk")
        if fault == "memory" or (fault == "memory until 2" and split < 2):
            raise MemoryError
        if fault == "slow":
            time.sleep(0.5)
        if fault == "signal":
            os.kill(int((self._folder / "driver").read_text()), signal.SIGTERM)
            time.sleep(0.3)
        value = self._weights @ self._weights * tile.index
        np.save(self._folder / f"tile-{tile.index}.npy", value)
        return TileRecord(
            tile.index, int(os.environ.get("OMP_NUM_THREADS", "0")), 0.0, value.nbytes, 0, self._worker, split
        )

    def close(self) -> None:
        (self._folder / f"closed-{self._worker}").touch()


class ToyJob(AbstractJob):
    def __init__(self, folder: Path, faults: Mapping[int, str] | None = None, open_fault: str = "") -> None:
        self._folder = folder
        self._faults = dict(faults or {})
        self._open_fault = open_fault

    @property
    def weights(self) -> Mapping[str, np.ndarray]:
        return {"w": np.arange(9.0).reshape(3, 3)}

    def halvings(self, tile: Tile) -> int:
        return 3 if self._faults.get(tile.index, "").startswith("memory until") else 0

    def open(self, weights: Mapping[str, np.ndarray], worker: int, device: str, threads: int) -> AbstractWorker:
        if self._open_fault:
            raise ValueError(self._open_fault)
        (self._folder / f"opened-{worker}").write_text(f"{device} {threads}")
        return ToyWorker(self._folder, weights, worker, self._faults)


class Recorder:
    """Keeps every event."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def notify(self, event: Event) -> None:
        self.events.append(event)

    @property
    def done(self) -> list[int]:
        return sorted(event.tile.index for event in self.events if isinstance(event, TileDone))

    @property
    def failed(self) -> list[TileFailed]:
        return [event for event in self.events if isinstance(event, TileFailed)]

    @property
    def end(self) -> RunEnded:
        (event,) = [event for event in self.events if isinstance(event, RunEnded)]
        return event
