"""What a worker runs: a job is opened once per worker and then computes tile after tile."""

from __future__ import annotations

import abc
from collections.abc import Mapping

import numpy as np

from disthess.store.layout import Tile, TileRecord


class AbstractWorker(abc.ABC):
    """Computes tiles, in one process, one after another."""

    @abc.abstractmethod
    def compute(self, tile: Tile, split: int = 0) -> TileRecord:
        """Compute a tile and write its data. Doing it twice, or in two places at once, writes the same bytes.

        Args:
            tile: Which.
            split: How often to halve what is computed at a time; the same split gives the same bytes, another one the same
                numbers to rounding.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Put back what opening changed in the process."""


class AbstractJob(abc.ABC):
    """Knows how to make a worker. It is sent to each worker by cloudpickle, without its weights."""

    @property
    @abc.abstractmethod
    def weights(self) -> Mapping[str, np.ndarray]:
        """Large arrays, shipped once to all workers."""

    def halvings(self, tile: Tile) -> int:
        """How often a tile can be split when memory runs out."""
        return 0

    @abc.abstractmethod
    def open(self, weights: Mapping[str, np.ndarray], worker: int, device: str, threads: int) -> AbstractWorker:
        """Make the worker.

        Args:
            weights: What ``weights`` said; arrays may be read-only.
            worker: Its number.
            device: Torch's name of its device.
            threads: Threads it may use.
        """
