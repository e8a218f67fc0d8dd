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
    """

    tile: Tile
    message: str
    attempts: int
    final: bool


@dataclass(frozen=True, slots=True)
class RunEnded:
    """No tile is in flight any more.

    Attributes:
        finished: Tiles computed in this run.
        failed: Tiles given up.
        stopped: Whether a signal ended it early.
        seconds: Wall time.
    """

    finished: int
    failed: int
    stopped: bool
    seconds: float


Event = RunStarted | TileDone | TileFailed | RunEnded


class Listener(Protocol):
    """Told of every event, in the driver's thread, in order. What it raises ends the run."""

    def notify(self, event: Event) -> None:
        """Take note of an event."""
        ...
