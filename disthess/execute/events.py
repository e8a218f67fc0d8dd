"""What happens while tiles are computed, as values; progress, ledger and tests are listeners."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from disthess.store.layout import Tile, TileRecord


@dataclass(frozen=True, slots=True)
class RunStarted:
    """The executor is about to start workers.

    Attributes:
        tiles: Tiles to compute.
        done_before: Tiles that were done already.
        flops: Projected floating point operations of ``tiles``.
        written_bytes: Bytes that they will write.
        workers: Number of workers.
    """

    tiles: int
    done_before: int
    flops: int
    written_bytes: int
    workers: int


@dataclass(frozen=True, slots=True)
class TileDone:
    """A tile's data is written; its ledger row is not."""

    record: TileRecord
    tile: Tile


@dataclass(frozen=True, slots=True)
class TileFailed:
    """A tile raised, or its worker died.

    Attributes:
        tile: The tile.
        message: What happened, one short paragraph.
        attempts: How often it has been tried.
        final: Whether it is given up.
        split: How often it will be halved at the next attempt, if memory ran out.
    """

    tile: Tile
    message: str
    attempts: int
    final: bool
    split: int = 0


@dataclass(frozen=True, slots=True)
class WorkersChanged:
    """A worker is ready, or gone. An executor whose workers come and go says so.

    Attributes:
        working: Workers that compute, or could.
        wanted: How many the run asked for.
    """

    working: int
    wanted: int


@dataclass(frozen=True, slots=True)
class RunEnded:
    """No tile is in flight any more.

    Attributes:
        finished: Tiles computed in this run.
        failed: Tiles given up.
        stopped: Whether a signal ended it early.
        seconds: Wall time.
        split: Of the finished tiles, how many were computed in smaller pieces because memory ran out.
    """

    finished: int
    failed: int
    stopped: bool
    seconds: float
    split: int = 0


Event = RunStarted | TileDone | TileFailed | WorkersChanged | RunEnded


class Listener(Protocol):
    """Told of every event, in the driver's thread, in order. What it raises ends the run."""

    def notify(self, event: Event) -> None:
        """Take note of an event."""
        ...
