"""The listener that keeps the ledger: data first, then the mark.

A mark is written at once, before its worker is given another tile, where what waits is worth more than ``WAITING_SECONDS``; marks
of smaller tiles wait for each other. A driver that is killed therefore forgets the tiles in flight, one per worker, and besides
them no more work than that; on an object store, where a mark takes many requests, twice what marks take. Forgotten tiles are
computed again, to the same bytes.
"""

from __future__ import annotations

import time
from typing import final

from disthess.execute.events import Event, Listener, RunEnded, TileDone, TileFailed
from disthess.store.layout import TileRecord
from disthess.store.store import Store

WAITING_SECONDS = 0.05
"""Work that may wait for its marks,"""

FLUSH_SECONDS = 0.5
"""and how long at most, while tiles are finished."""

FLUSH_SHARE = 0.1
"""Of the driver's time may go into marks, which on an object store take many requests: then they are made less often."""


@final
class LedgerMarks:
    """Marks finished tiles, notes those given up, and passes every event on.

    Args:
        store: Open for writing.
        listener: Who else wants to know.
    """

    def __init__(self, store: Store, listener: Listener) -> None:
        self._store = store
        self._listener = listener
        self._waiting: list[TileRecord] = []
        self._flushed = time.monotonic()
        self._cost = 0.0

    def notify(self, event: Event) -> None:
        """Take note of an event."""
        if isinstance(event, TileDone):
            self._waiting.append(event.record)
            if self._is_due():
                self._flush()
        elif isinstance(event, TileFailed) and event.final:
            self._store.quarantine(event.tile.index, event.message)
        elif isinstance(event, RunEnded):
            self._flush()
        self._listener.notify(event)

    def _is_due(self) -> bool:
        worth = sum(record.seconds for record in self._waiting)
        late = time.monotonic() - self._flushed > max(FLUSH_SECONDS, self._cost / FLUSH_SHARE)
        return late or worth >= (WAITING_SECONDS if self._store.is_local else max(WAITING_SECONDS, 2 * self._cost))

    def _flush(self) -> None:
        begin = time.monotonic()
        if self._waiting:
            self._store.mark(self._waiting)
        self._waiting = []
        self._flushed = time.monotonic()
        self._cost = self._flushed - begin
