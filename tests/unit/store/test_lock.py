from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from disthess.errors import StoreError
from disthess.store.lock import StoreLock

_HOLDER = """
import sys, time
from disthess.store.lock import StoreLock
with StoreLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


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
    with StoreLock(store):
        assert json.loads((tmp_path / "run.zarr.lock").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_number_given_to_another_process_since_is_no_holder(tmp_path: Path) -> None:
    with StoreLock(tmp_path / "s"):
        holder = json.loads((tmp_path / "s.lock").read_text())
    (tmp_path / "s.lock").write_text(json.dumps({**holder, "started": holder["started"] - 1000}))
    with StoreLock(tmp_path / "s"):
        pass


@pytest.mark.parametrize("text", ["", "{", json.dumps({"host": "elsewhere", "pid": 1, "started": 0})])
def test_a_holder_that_cannot_be_asked_is_believed(tmp_path: Path, text: str) -> None:
    (tmp_path / "s.lock").write_text(text)
    with pytest.raises(StoreError, match=r"remove .*s.lock"), StoreLock(tmp_path / "s"):
        pass
    assert (tmp_path / "s.lock").read_text() == text


def test_of_many_that_take_over_one_wins(tmp_path: Path) -> None:
    with StoreLock(tmp_path / "s"):
        holder = json.loads((tmp_path / "s.lock").read_text())
    (tmp_path / "s.lock").write_text(json.dumps({**holder, "started": 1.0}))
    locks = [StoreLock(tmp_path / "s") for _ in range(8)]

    def enter(lock: StoreLock) -> bool:
        try:
            lock.__enter__()
        except StoreError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(enter, locks))
    assert won.count(True) == 1
    locks[won.index(True)].__exit__(None, None, None)
