"""Which worker computes which tile next: bookkeeping alone, no ray, no clock.

Each worker has a queue of the tiles it owns. An idle worker with an empty queue takes the last tile of the longest queue. An
attempt that fails, or kills its worker, is counted per tile; after ``max_attempts`` the tile is given up. A tile that runs out
of memory is tried again in smaller pieces, and that attempt counts only once there are no smaller ones. A dead worker's tiles
go to the living. No tile is ever lost: each ends as finished or as failed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import final

from disthess.execute.events import TileFailed
from disthess.store.layout import Tile


@final
class Dispatcher:
    """State of all tiles of a run.

    Args:
        tiles: In the order in which an owner computes its own.
        workers: Number of workers; a tile of a larger owner goes to ``owner % workers``.
        max_attempts: Attempts per tile.
        halvings: How often a tile can be split.
    """

    def __init__(
        self,
        tiles: Sequence[Tile],
        workers: int,
        max_attempts: int = 3,
        halvings: Callable[[Tile], int] = lambda tile: 0,
    ) -> None:
        if workers < 1 or max_attempts < 1:
            raise ValueError(f"workers and attempts must be positive, got {workers} and {max_attempts}")
        self._queues: dict[int, deque[Tile]] = {worker: deque() for worker in range(workers)}
        for tile in tiles:
            self._queues[tile.owner % workers].append(tile)
        self._in_flight: dict[int, Tile] = {}
        self._attempts: dict[int, int] = {}
        self._max_attempts = max_attempts
        self._alive = set(self._queues)
        self._failures: list[TileFailed] = []
        self._finished = 0
        self._halvings = halvings
        self._splits: dict[int, int] = {}
        self._finished_split = 0

    @property
    def finished(self) -> int:
        """Tiles that are done."""
        return self._finished

    @property
    def finished_split(self) -> int:
        """Of these, tiles that were computed in smaller pieces."""
        return self._finished_split

    @property
    def failures(self) -> tuple[TileFailed, ...]:
        """Tiles that were given up."""
        return tuple(self._failures)

    @property
    def queued(self) -> int:
        """Tiles that nobody computes now."""
        return sum(len(queue) for queue in self._queues.values())

    @property
    def settled(self) -> bool:
        """Whether every tile is done or given up."""
        return not self._in_flight and not self.queued

    @property
    def alive(self) -> frozenset[int]:
        """Workers that may be given tiles."""
        return frozenset(self._alive)

    def in_flight(self, worker: int) -> Tile | None:
        """What a worker computes now."""
        return self._in_flight.get(worker)

    def split(self, tile: Tile) -> int:
        """How often the next attempt at a tile halves it."""
        return self._splits.get(tile.index, 0)

    def take(self, worker: int) -> Tile | None:
        """The next tile for an idle living worker, its own first; None where nothing is left.

        Raises:
            ValueError: The worker is dead, or not idle.
        """
        if worker not in self._alive or worker in self._in_flight:
            raise ValueError(f"worker {worker} is dead or busy")
        queue = self._queues[worker]
        if queue:
            tile = queue.popleft()
        else:
            longest = max(self._queues.values(), key=len)
            if not longest:
                return None
            tile = longest.pop()
        self._in_flight[worker] = tile
        return tile

    def finish(self, worker: int) -> Tile:
        """The worker's tile is done."""
        tile = self._in_flight.pop(worker)
        self._finished += 1
        self._finished_split += self.split(tile) > 0
        return tile

    def fail(self, worker: int, message: str, memory: bool = False) -> TileFailed:
        """The worker's tile raised: it is tried again, elsewhere if there is another worker, or given up.

        Args:
            worker: Whose tile.
            message: Why.
            memory: Whether memory ran out.
        """
        tile = self._in_flight.pop(worker)
        event = self._smaller(tile, message) if memory else None
        if event is None:
            attempts = self._attempts[tile.index] = self._attempts.get(tile.index, 0) + 1
            event = TileFailed(tile, message, attempts, attempts >= self._max_attempts)
        if event.final:
            self._failures.append(event)
        else:
            others = (self._alive - {worker}) or {worker}
            self._queues[min(others, key=lambda other: (len(self._queues[other]), other))].append(tile)
        return event

    def _smaller(self, tile: Tile, message: str) -> TileFailed | None:
        split = self.split(tile) + 1
        if split > self._halvings(tile):
            return None
        self._splits[tile.index] = split
        return TileFailed(tile, message, self._attempts.get(tile.index, 0), False, split)

    def lose(self, worker: int, message: str, memory: bool = False) -> TileFailed | None:
        """The worker died. What it computed counts as a failed attempt; its queue goes to the living.

        Where nobody lives, the queues stay as they are, for ``revive`` or ``give_up``.
        """
        self._alive.discard(worker)
        event = self.fail(worker, message, memory) if worker in self._in_flight else None
        if self._alive:
            orphans, self._queues[worker] = self._queues[worker], deque()
            for tile in orphans:
                heir = min(self._alive, key=lambda other: (len(self._queues[other]), other))
                self._queues[heir].append(tile)
        return event

    def revive(self, worker: int) -> None:
        """A fresh worker stands in for a dead one."""
        self._alive.add(worker)

    def give_up(self, message: str) -> tuple[TileFailed, ...]:
        """Nobody is left: all queued tiles fail."""
        events: list[TileFailed] = []
        for queue in self._queues.values():
            events.extend(TileFailed(tile, message, self._attempts.get(tile.index, 0), True) for tile in queue)
            queue.clear()
        events.sort(key=lambda event: event.tile.index)
        self._failures.extend(events)
        return tuple(events)
