"""When finished tiles are entered in the ledger."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from disthess.execute import marks
from disthess.execute.events import RunEnded, TileDone
from disthess.execute.marks import LedgerMarks
from disthess.store.layout import TileRecord


class Store:
    """Counts marks, each of which takes so many seconds of a clock."""

    def __init__(self, *, local: bool, seconds: float, clock: list[float]) -> None:
        self.is_local = local
        self.marked: list[list[int]] = []
        self._seconds = seconds
        self._clock = clock

    def mark(self, records: list[TileRecord]) -> None:
        self.marked.append([record.tile for record in records])
        self._clock[0] += self._seconds


class Nobody:
    def notify(self, event: Any) -> None:
        pass


def finish(ledger: LedgerMarks, clock: list[float], tiles: range, seconds: float) -> None:
    for tile in tiles:
        clock[0] += seconds
        ledger.notify(TileDone(TileRecord(tile, 0, seconds, 1, 1, 0, 0), None))  # type: ignore[arg-type]


def make(monkeypatch: pytest.MonkeyPatch, *, local: bool, seconds: float) -> tuple[LedgerMarks, Store, list[float]]:
    clock = [100.0]
    monkeypatch.setattr(marks.time, "monotonic", lambda: clock[0])
    store = Store(local=local, seconds=seconds, clock=clock)
    return LedgerMarks(store, Nobody()), store, clock  # type: ignore[arg-type]


def test_a_tile_worth_waiting_for_is_marked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, store, clock = make(monkeypatch, local=True, seconds=0.001)
    finish(ledger, clock, range(3), 0.05)
    assert store.marked == [[0], [1], [2]]


def test_small_tiles_wait_until_50_ms_of_work_could_be_lost_and_the_end_marks_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ledger, store, clock = make(monkeypatch, local=True, seconds=0.001)
    finish(ledger, clock, range(8), 0.0125)
    assert store.marked == [[0, 1, 2, 3], [4, 5, 6, 7]]
    finish(ledger, clock, range(8, 9), 0.0125)
    ledger.notify(RunEnded(9, 0, False, 1.0, 0))
    assert store.marked[2:] == [[8]]


def test_where_a_mark_takes_seconds_marks_take_half_as_long_as_the_work_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ledger, store, clock = make(monkeypatch, local=False, seconds=2.0)
    finish(ledger, clock, range(64), 0.5)
    assert 2.0 * len(store.marked) <= 64 * 0.5 / 2
    assert list(itertools.chain(*store.marked)) == list(range(sum(map(len, store.marked))))
