from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from disthess.errors import StoreError
from disthess.store.claim import Claim, make_beat
from disthess.store.lock import LeaseTimes, StoreLock
from disthess.store.place import LocalPlace

_HOLDER = """
import sys, time
from disthess.store.lock import StoreLock
with StoreLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""

QUICK = LeaseTimes(beat_seconds=0.05, stale_seconds=0.5)
REFUSING = LeaseTimes(wait=False)


def elsewhere(**changes: Any) -> Claim:
    """A claim of a process that nobody here can ask."""
    return replace(Claim.make(), host="elsewhere", boot="other", **changes)


def put(store: Path, key: str, data: bytes) -> None:
    LocalPlace(Path(f"{store}.lock")).write(key, data)


@contextmanager
def beating(store: Path, claim: Claim) -> Iterator[None]:
    """The heartbeat of a claim, kept up from here."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.05):
            put(store, f"beat-{claim.token}", make_beat())

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_a_second_run_is_refused_and_told_who(tmp_path: Path) -> None:
    store = tmp_path / "deep" / "run.zarr"
    with (
        StoreLock(store),
        pytest.raises(StoreError, match=rf"process {os.getpid()} on host.*remove .*run.zarr.lock"),
        StoreLock(store),
    ):
        pass
    assert list(store.parent.iterdir()) == []
    with StoreLock(store):
        pass


def test_another_store_is_free(tmp_path: Path) -> None:
    with StoreLock(tmp_path / "a"), StoreLock(tmp_path / "b"):
        assert len(list(tmp_path.iterdir())) == 2


def test_the_lock_of_a_living_process_holds_and_that_of_a_killed_one_is_taken(tmp_path: Path) -> None:
    store = tmp_path / "run.zarr"
    command = [sys.executable, "-c", _HOLDER, str(store)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(StoreError, match=f"process {process.pid} on host"), StoreLock(store):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    started = time.monotonic()
    with StoreLock(store):
        assert time.monotonic() - started < 10
        old = json.loads((tmp_path / "run.zarr.lock" / "holder").read_text())
        taken = json.loads((tmp_path / "run.zarr.lock" / f"after-{old['token']}").read_text())
        assert (old["pid"], taken["pid"]) == (process.pid, os.getpid())
    assert list(tmp_path.iterdir()) == []


def test_a_number_given_to_another_process_since_is_no_holder(tmp_path: Path) -> None:
    put(tmp_path / "s", "holder", replace(Claim.make(), started=Claim.make().started - 1000).to_bytes())
    with StoreLock(tmp_path / "s"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[1]", json.dumps({"token": "../x", "pid": 1}).encode(), elsewhere().to_bytes()]
)
def test_a_holder_that_cannot_be_asked_is_believed(tmp_path: Path, text: bytes) -> None:
    put(tmp_path / "s", "holder", text)
    with pytest.raises(StoreError, match=r"remove .*s.lock"), StoreLock(tmp_path / "s", REFUSING):
        pass
    assert (tmp_path / "s.lock" / "holder").read_bytes() == text
    with StoreLock(tmp_path / "s", QUICK):
        assert len(list((tmp_path / "s.lock").glob("after-*"))) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_heartbeat_that_moves_is_believed_whatever_its_clock_says(tmp_path: Path) -> None:
    claim = elsewhere(monotonic=-1e9, since="long ago")
    put(tmp_path / "s", "holder", claim.to_bytes())
    with beating(tmp_path / "s", claim), pytest.raises(StoreError, match="host elsewhere, since long ago"):
        StoreLock(tmp_path / "s", QUICK).__enter__()
    started = time.monotonic()
    with StoreLock(tmp_path / "s", QUICK):
        assert time.monotonic() - started > QUICK.stale_seconds


def test_on_one_machine_a_heartbeat_that_stands_still_needs_no_watching(tmp_path: Path) -> None:
    put(tmp_path / "s", "holder", replace(Claim.make(), monotonic=time.monotonic() - 100).to_bytes())
    started = time.monotonic()
    with StoreLock(tmp_path / "s"):
        assert time.monotonic() - started < 10


def enter(lock: StoreLock) -> bool:
    try:
        lock.__enter__()
    except StoreError:
        return False
    return True


@pytest.mark.parametrize("old", [None, replace(Claim.make(), started=1.0), elsewhere()])
def test_of_many_that_take_over_one_wins(tmp_path: Path, old: Claim | None) -> None:
    for round_ in range(3):
        store = tmp_path / f"s{round_}"
        if old is not None:
            put(store, "holder", old.to_bytes())
        locks = [StoreLock(store, QUICK) for _ in range(8)]
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(enter, locks))
        assert won.count(True) == 1
        locks[won.index(True)].check()
        locks[won.index(True)].__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_leases_taken_and_given_back_at_random_never_overlap(tmp_path: Path) -> None:
    inside: list[int] = []
    most: list[int] = []
    ended = time.monotonic() + 1

    def work(number: int) -> int:
        count = 0
        while time.monotonic() < ended:
            lock = StoreLock(tmp_path / "s", LeaseTimes(wait=False))
            if enter(lock):
                inside.append(number)
                most.append(len(inside))
                time.sleep(0.001)
                inside.remove(number)
                lock.__exit__(None, None, None)
                count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        counts = list(pool.map(work, range(4)))
    assert sum(counts) > 10
    assert max(most) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_holder_that_was_superseded_stops_and_frees_nothing(tmp_path: Path) -> None:
    lock = StoreLock(tmp_path / "s", QUICK)
    with lock:
        lock.check()
        old = json.loads((tmp_path / "s.lock" / "holder").read_text())["token"]
        new = elsewhere()
        put(tmp_path / "s", f"after-{old}", new.to_bytes())
        time.sleep(6 * QUICK.beat_seconds)
        with pytest.raises(StoreError, match=r"host elsewhere.*has taken over.*stops"):
            lock.check()
    with pytest.raises(StoreError, match="elsewhere"), StoreLock(tmp_path / "s", REFUSING):
        pass
    with pytest.raises(StoreError, match="not held"):
        lock.check()


def test_a_holder_that_was_suspended_looks_before_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StoreLock, "_keep", lambda self: None)  # no heartbeat, as in a process that is stopped
    with StoreLock(tmp_path / "s", QUICK) as first:
        time.sleep(QUICK.stale_seconds + 0.1)
        with StoreLock(tmp_path / "s", QUICK) as second:
            with pytest.raises(StoreError, match="has taken over"):
                first.check()
            second.check()


def test_a_lock_removed_by_hand_is_noticed(tmp_path: Path) -> None:
    with StoreLock(tmp_path / "s", QUICK) as lock:
        (tmp_path / "s.lock" / "holder").unlink()
        time.sleep(6 * QUICK.beat_seconds)
        with pytest.raises(StoreError, match="was removed while it ran"):
            lock.check()
    assert list(tmp_path.iterdir()) == []


def test_a_claim_made_too_late_hangs_in_the_air(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A taker decides that a lease is dead, is suspended, and goes on when the lease has ended and another has begun."""
    store = tmp_path / "s"
    dead = replace(Claim.make(), started=1.0)
    put(store, "holder", dead.to_bytes())
    winner = StoreLock(store)
    real, made = LocalPlace.create, []

    def create_late(self: LocalPlace, key: str, data: bytes) -> bool:
        monkeypatch.setattr(LocalPlace, "create", real)
        with StoreLock(store):  # takes over from the dead, and gives the lease back
            pass
        winner.__enter__()
        made.append((key, real(self, key, data)))
        return made[-1][1]

    monkeypatch.setattr(LocalPlace, "create", create_late)
    with pytest.raises(StoreError, match=f"process {os.getpid()}"), StoreLock(store):
        pass
    assert made == [(f"after-{dead.token}", True)], (
        "it was told that it created its claim, and yet does not hold the lease"
    )
    winner.check()
    winner.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_of_an_older_version_is_explained(tmp_path: Path) -> None:
    (tmp_path / "s.lock").write_text("{}")
    with pytest.raises(StoreError, match=r"s.lock is a file.*older version.*remove it"), StoreLock(tmp_path / "s"):
        pass


def test_a_lease_that_is_given_back_is_free_at_once(tmp_path: Path) -> None:
    """Killed between the end of its chain and the removal of its start."""
    first = replace(Claim.make(), started=1.0)
    put(tmp_path / "s", "holder", first.to_bytes())
    put(tmp_path / "s", f"after-{first.token}", replace(Claim.make(released=True), started=1.0).to_bytes())
    started = time.monotonic()
    with StoreLock(tmp_path / "s"):
        assert time.monotonic() - started < 10
    assert list(tmp_path.iterdir()) == []
