"""The listener that keeps the ledger: data first, then the mark, a few marks at a time."""

from __future__ import annotations

import time
from typing import final

from disthess.execute.events import Event, Listener, RunEnded, TileDone, TileFailed
from disthess.store.layout import TileRecord
from disthess.store.store import Store

FLUSH_SECONDS = 0.5
"""A killed driver forgets at most the marks of this long; their tiles are computed again, to the same bytes."""

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
        self._pause = FLUSH_SECONDS

    def notify(self, event: Event) -> None:
        """Take note of an event."""
        if isinstance(event, TileDone):
            self._waiting.append(event.record)
            if time.monotonic() - self._flushed > self._pause:
                self._flush()
        elif isinstance(event, TileFailed) and event.final:
            self._store.quarantine(event.tile.index, event.message)
        elif isinstance(event, RunEnded):
            self._flush()
        self._listener.notify(event)

    def _flush(self) -> None:
        started = time.monotonic()
        if self._waiting:
            self._store.mark(self._waiting)
        self._waiting = []
        self._flushed = time.monotonic()
        self._pause = max(FLUSH_SECONDS, (self._flushed - started) / FLUSH_SHARE)
