"""The dispatcher against scripted workers: no tile is lost, whoever dies, and attempts are counted."""

from __future__ import annotations

import heapq
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disthess.execute.dispatch import Dispatcher
from disthess.store.layout import Tile
from disthess.types import Span


def tiles_of(owners: list[int]) -> list[Tile]:
    return [Tile(i, "s", Span(i, i + 1), 0, owner, 1, 1, 1) for i, owner in enumerate(owners)]


def taken(dispatcher: Dispatcher, worker: int) -> int | None:
    tile = dispatcher.take(worker)
    return None if tile is None else tile.index


def test_own_tiles_come_first_and_in_order() -> None:
    dispatcher = Dispatcher(tiles_of([0, 1, 0, 1]), 2)
    order = []
    for _ in range(2):
        for worker in (1, 0):
            order.append(taken(dispatcher, worker))
            dispatcher.finish(worker)
    assert order == [1, 0, 3, 2]
    assert taken(dispatcher, 0) is None
    assert dispatcher.finished == 4


def test_an_idle_worker_takes_the_last_tile_of_the_longest_queue() -> None:
    dispatcher = Dispatcher(tiles_of([0, 1, 1, 1, 2, 2]), 3)
    assert taken(dispatcher, 0) == 0
    dispatcher.finish(0)
    assert taken(dispatcher, 0) == 3
    dispatcher.finish(0)
    assert taken(dispatcher, 1) == 1
    assert taken(dispatcher, 0) == 5


def test_a_tile_that_fails_goes_elsewhere_and_is_given_up_after_three() -> None:
    dispatcher = Dispatcher(tiles_of([0, 1]), 2)
    assert taken(dispatcher, 0) == 0
    first = dispatcher.fail(0, "a")
    assert (first.attempts, first.final) == (1, False)
    assert [taken(dispatcher, 1), dispatcher.finish(1).index] == [1, 1]
    assert taken(dispatcher, 1) == 0
    assert dispatcher.fail(1, "b").attempts == 2
    assert taken(dispatcher, 0) == 0
    last = dispatcher.fail(0, "c")
    assert (last.attempts, last.final, last.message) == (3, True, "c")
    assert [event.tile.index for event in dispatcher.failures] == [0]
    assert dispatcher.queued == 0


def test_a_single_worker_tries_again_after_the_others() -> None:
    dispatcher = Dispatcher(tiles_of([0, 0]), 1, max_attempts=2)
    assert taken(dispatcher, 0) == 0
    dispatcher.fail(0, "")
    assert taken(dispatcher, 0) == 1
    dispatcher.finish(0)
    assert taken(dispatcher, 0) == 0
    assert dispatcher.fail(0, "").final


def test_the_tiles_of_the_dead_go_to_the_living() -> None:
    dispatcher = Dispatcher(tiles_of([0, 0, 0, 1]), 2)
    assert taken(dispatcher, 0) == 0
    event = dispatcher.lose(0, "died")
    assert event is not None
    assert (event.tile.index, event.attempts, event.final) == (0, 1, False)
    assert dispatcher.alive == {1}
    with pytest.raises(ValueError, match="dead or busy"):
        dispatcher.take(0)
    got = []
    while (number := taken(dispatcher, 1)) is not None:
        got.append(number)
        dispatcher.finish(1)
    assert sorted(got) == [0, 1, 2, 3]


def test_where_all_are_dead_the_rest_fails_or_waits_for_a_fresh_one() -> None:
    dispatcher = Dispatcher(tiles_of([0, 1, 1]), 2)
    dispatcher.take(1)
    dispatcher.lose(1, "died")
    assert dispatcher.lose(0, "died") is None
    assert dispatcher.queued == 3
    dispatcher.revive(1)
    assert taken(dispatcher, 1) is not None
    dispatcher.lose(1, "died again")
    given_up = dispatcher.give_up("no worker is left")
    assert [event.tile.index for event in given_up] == [0, 1, 2]
    assert all(event.final for event in given_up)
    assert dispatcher.queued == 0


def test_owners_beyond_the_workers_are_folded() -> None:
    dispatcher = Dispatcher(tiles_of([0, 5]), 2)
    assert taken(dispatcher, 1) == 1


@given(
    owners=st.lists(st.integers(0, 3), max_size=25),
    workers=st.integers(1, 4),
    script=st.lists(st.sampled_from(["ok", "ok", "ok", "fail", "die"]), max_size=80),
    revivals=st.integers(0, 6),
)
def test_every_tile_ends_once_as_finished_or_failed(
    owners: list[int], workers: int, script: list[str], revivals: int
) -> None:
    """A clock of scripted durations plays the part of real workers."""
    dispatcher = Dispatcher(tiles_of(owners), workers)
    steps = iter(script)
    finished: list[int] = []
    attempts: Counter[int] = Counter()
    clock: list[tuple[int, int]] = []
    now = 0
    while True:
        for worker in sorted(dispatcher.alive):
            if dispatcher.in_flight(worker) is None and (tile := dispatcher.take(worker)) is not None:
                attempts[tile.index] += 1
                heapq.heappush(clock, (now + 1 + tile.index % 3, worker))
        if not clock:
            break
        now, worker = heapq.heappop(clock)
        what = next(steps, "ok")
        if what == "ok":
            finished.append(dispatcher.finish(worker).index)
        elif what == "fail":
            dispatcher.fail(worker, "scripted")
        else:
            dispatcher.lose(worker, "scripted")
            if revivals:
                revivals -= 1
                dispatcher.revive(worker)
    if dispatcher.queued:
        assert not dispatcher.alive
        dispatcher.give_up("all dead")
    failed = [event.tile.index for event in dispatcher.failures]
    assert sorted(finished + failed) == list(range(len(owners)))
    assert max(attempts.values(), default=0) <= 3
    assert dispatcher.finished == len(finished)
