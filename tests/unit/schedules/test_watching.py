"""The watch, with a clock and a runner of the tests' own; and once for real, with processes and signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from disthess.errors import ConfigError, StoreError
from disthess.schedules import watch
from disthess.schedules.cron import Cron
from disthess.schedules.runner import KILLED, AbstractRunner, ProcessRunner
from disthess.schedules.state import WatchState, held, read_state, write_state
from disthess.schedules.watch import AbstractClock, Watch

BERLIN = ZoneInfo("Europe/Berlin")


@dataclass
class Machine(AbstractClock, AbstractRunner):
    """Clock and runner in one: time passes only by waiting and by running audits.

    Attributes:
        time: Now.
        stop: When the watch is asked to end.
        minutes: How long an audit takes.
        steps: Jumps of the clock: at the first look after the moment, by so much.
    """

    time: datetime
    stop: datetime
    minutes: float = 1.0
    code: int = 0
    steps: list[tuple[datetime, timedelta]] = field(default_factory=list)
    started: list[datetime] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    running: int = 0
    looks: int = 0
    watch: Watch | None = None
    during: Callable[[], None] = lambda: None

    def now(self) -> datetime:
        self.looks += 1
        while self.steps and self.time >= self.steps[0][0]:
            self.time += self.steps.pop(0)[1]
        return self.time

    def wait(self, seconds: float, ended: threading.Event) -> None:
        assert seconds > 0
        self.time += timedelta(seconds=seconds)
        if self.time >= self.stop and self.watch is not None:
            self.watch.end()

    def run(self, deadline_seconds: float, lock: int, is_cancelled: Callable[[], bool]) -> int:
        assert self.running == 0
        self.running += 1
        os.fstat(lock)
        self.started.append(self.time)
        self.during()
        self.time += timedelta(minutes=self.minutes)
        self.running -= 1
        return self.code

    def live(self, folder: Path, cron: str, *, once: bool = False, zone: ZoneInfo = BERLIN) -> int:
        """One life of a watch, up to ``stop``."""
        config = folder / "audit.yaml"
        self.watch = Watch(config, Cron(cron), zone, folder / "state.json", self, 3600, self, self.said.append)
        return self.watch.run(once=once)

    @property
    def starts(self) -> list[str]:
        return [f"{moment.astimezone(BERLIN):%d %H:%M}" for moment in self.started]


@pytest.fixture(autouse=True)
def _few_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks at the clock cost the tests time, and nothing else."""
    monkeypatch.setattr(watch, "LOOK_SECONDS", 600.0)


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=BERLIN).astimezone(UTC)


def test_it_runs_at_each_due_time_and_remembers(tmp_path: Path) -> None:
    machine = Machine(at("2024-06-10 12:00"), at("2024-06-13 12:00"), code=3)
    assert machine.live(tmp_path, "0 3 * * *") == 0
    assert machine.starts == ["11 03:00", "12 03:00", "13 03:00"]
    state = json.loads((tmp_path / "state.json").read_text())
    assert (state["exit_code"], state["config"]) == (3, str(tmp_path / "audit.yaml"))
    assert datetime.fromisoformat(state["finished"]) == at("2024-06-13 03:01")
    assert sum("raised an alert" in sentence for sentence in machine.said) == 3
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_first_life_makes_up_for_nothing(tmp_path: Path) -> None:
    machine = Machine(at("2024-06-10 03:00") + timedelta(seconds=1), at("2024-06-10 04:00"))
    machine.live(tmp_path, "0 3 * * *")
    assert machine.started == []


def test_what_was_missed_between_two_lives_is_made_up_for_once(tmp_path: Path) -> None:
    Machine(at("2024-06-10 12:00"), at("2024-06-11 12:00")).live(tmp_path, "0 3 * * *")
    later = Machine(at("2024-06-20 12:00"), at("2024-06-21 12:00"))
    later.live(tmp_path, "0 3 * * *")
    assert later.starts == ["20 12:00", "21 03:00"]
    assert "an audit was due at 2024-06-20 03:00:00+02:00, and is made up for now" in later.said
    again = Machine(at("2024-06-21 12:00"), at("2024-06-21 20:00"))
    again.live(tmp_path, "0 3 * * *")
    assert again.started == []


def test_a_life_that_began_but_never_ran_remembers_since_when(tmp_path: Path) -> None:
    Machine(at("2024-06-10 12:00"), at("2024-06-10 13:00")).live(tmp_path, "0 3 * * *")
    later = Machine(at("2024-06-11 12:00"), at("2024-06-11 13:00"))
    later.live(tmp_path, "0 3 * * *")
    assert later.starts == ["11 12:00"]


def test_a_killed_audit_is_run_again_by_the_next_life(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def die() -> None:
        raise Killed

    machine = Machine(at("2024-06-10 12:00"), at("2024-06-12 12:00"), during=die)
    with pytest.raises(Killed):
        machine.live(tmp_path, "0 3 * * *")
    later = Machine(at("2024-06-11 05:00"), at("2024-06-11 06:00"))
    later.live(tmp_path, "0 3 * * *")
    assert later.starts == ["11 05:00"]


def test_audits_longer_than_the_interval_never_overlap_and_are_not_queued(tmp_path: Path) -> None:
    machine = Machine(at("2024-06-10 12:05"), at("2024-06-10 15:55"), minutes=25)
    machine.live(tmp_path, "*/10 * * * *")
    assert machine.starts == [
        f"10 {clock}" for clock in ("12:10", "12:40", "13:10", "13:40", "14:10", "14:40", "15:10", "15:40")
    ]
    # Not after a restart either: what came due while an audit ran was dealt with.
    later = Machine(at("2024-06-10 16:06"), at("2024-06-10 16:09"))
    later.live(tmp_path, "*/10 * * * *")
    assert later.started == []


@pytest.mark.parametrize(
    ("cron", "day", "expected"),
    [
        ("30 2 * * *", "2024-03-30", ["30 02:30", "31 03:00", "01 02:30"]),
        ("30 2 * * *", "2024-10-26", ["26 02:30", "27 02:30", "28 02:30"]),
        ("0 2,3 * * *", "2024-03-31", ["31 03:00", "01 02:00", "01 03:00"]),
        ("*/30 2 * * *", "2024-10-27", ["27 02:00", "27 02:30", "27 02:00", "27 02:30", "28 02:00", "28 02:30"]),
    ],
)
def test_days_on_which_clocks_change(tmp_path: Path, cron: str, day: str, expected: list[str]) -> None:
    start = at(f"{day} 01:15")
    machine = Machine(start, start + timedelta(days=3))
    machine.live(tmp_path, cron)
    assert machine.starts[: len(expected)] == expected


def test_a_clock_that_is_set_is_followed(tmp_path: Path) -> None:
    ahead = [(at("2024-06-10 13:00"), timedelta(days=3))]
    machine = Machine(at("2024-06-10 12:00"), at("2024-06-14 12:00"), steps=ahead)
    machine.live(tmp_path, "0 3 * * *")
    # Three due times were jumped over, and made up for once.
    assert machine.starts == ["13 13:00", "14 03:00"]
    (tmp_path / "back").mkdir()
    back = [(at("2024-06-12 13:00"), -timedelta(days=2))]
    machine = Machine(at("2024-06-11 12:00"), at("2024-06-12 20:00"), steps=back)
    machine.live(tmp_path / "back", "0 3 * * *")
    assert machine.starts == ["12 03:00", "11 03:00", "12 03:00"]
    assert any("set back" in sentence for sentence in machine.said)
    (tmp_path / "little").mkdir()
    little = [(at("2024-06-12 03:00") + timedelta(seconds=61), -timedelta(seconds=90))]
    machine = Machine(at("2024-06-11 12:00"), at("2024-06-12 20:00"), steps=little)
    machine.live(tmp_path / "little", "0 3 * * *")
    assert machine.starts == ["12 03:00"]


def test_it_looks_at_the_clock_often_enough_and_no_oftener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LOOK_SECONDS", 30.0)
    machine = Machine(at("2024-06-10 12:00"), at("2024-06-10 13:00"))
    machine.live(tmp_path, "0 3 * * *")
    assert 100 <= machine.looks <= 140


def test_asked_to_end_it_finishes_the_audit_in_flight(tmp_path: Path) -> None:
    machine = Machine(at("2024-06-10 12:00"), at("2024-06-30 12:00"))
    machine.during = lambda: machine.watch.end() if machine.watch else None
    assert machine.live(tmp_path, "0 3 * * *") == 0
    assert machine.starts == ["11 03:00"]
    state = read_state(tmp_path / "state.json")
    assert state is not None
    assert state.exit_code == 0


def test_asked_twice_the_audit_is_stopped_and_is_due_again(tmp_path: Path) -> None:
    machine = Machine(at("2024-06-10 12:00"), at("2024-06-30 12:00"), code=143)

    def twice() -> None:
        assert machine.watch is not None
        machine.watch.end()
        machine.watch.end()

    machine.during = twice
    assert machine.live(tmp_path, "0 3 * * *") == 0
    later = Machine(at("2024-06-11 04:00"), at("2024-06-11 05:00"))
    later.live(tmp_path, "0 3 * * *")
    assert later.starts == ["11 04:00"]


def test_once_ends_with_the_exit_code(tmp_path: Path) -> None:
    machine = Machine(at("2024-06-10 12:00"), at("2024-06-30 12:00"), code=3)
    assert machine.live(tmp_path, "0 3 * * *", once=True) == 3
    assert machine.starts == ["11 03:00"]


def test_two_watches_on_one_state_are_refused_and_orphans_waited_for(tmp_path: Path) -> None:
    machine = Machine(at("2024-06-10 12:00"), at("2024-06-11 12:00"))
    with held(tmp_path / "state.json.watch.lock"), pytest.raises(ConfigError, match="another watch uses"):
        machine.live(tmp_path, "0 3 * * *")
    with held(tmp_path / "state.json.audit.lock"):
        machine.live(tmp_path, "0 3 * * *")
    assert machine.started == []
    assert sum("an earlier watch is still running" in sentence for sentence in machine.said) == 1


def test_state_files_that_are_none_get_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    good = WatchState("/x", at("2024-06-10 12:00"), 0, at("2024-06-10 12:00"))
    write_state(file, good)
    assert read_state(file) == good
    machine = Machine(at("2024-06-10 12:00"), at("2024-06-11 12:00"))
    with pytest.raises(ConfigError, match="belongs to the audit file /x"):
        machine.live(tmp_path, "0 3 * * *")
    text = file.read_text()
    for old, new in (
        ("{", ""),
        ('"schema": 1', '"schema": 2'),
        ("2024", "20x4"),
        ("+00:00", ""),
        ('"exit_code": 0', '"exit_code": "0"'),
        ('"/x"', "3"),
    ):
        file.write_text(text.replace(old, new))
        with pytest.raises(StoreError, match="damaged"):
            read_state(file)
    file.write_bytes(b"\xff")
    with pytest.raises(StoreError, match="cannot be read"):
        read_state(file)
    with pytest.raises(StoreError, match="cannot be written"):
        write_state(file / "below", good)


def python(script: str, stop_seconds: float = 10) -> ProcessRunner:
    return ProcessRunner([sys.executable, "-c", script], Path("/"), stop_seconds)


def test_a_process_runs_to_its_end_or_its_deadline(tmp_path: Path) -> None:
    with held(tmp_path / "lock") as lock:
        assert python("raise SystemExit(3)").run(60, lock, lambda: False) == 3
        assert python("import os; os.kill(os.getpid(), 9)").run(60, lock, lambda: False) == 137
        started = time.monotonic()
        assert python("import time; time.sleep(60)").run(0.2, lock, lambda: False) == KILLED
        assert python("import time; time.sleep(60)").run(60, lock, lambda: True) == 143
        stubborn = "import signal, time; signal.signal(15, lambda *_: None); open('{}', 'w'); time.sleep(60)"
        mark = tmp_path / "ready"
        assert python(stubborn.format(mark), 0.3).run(60, lock, mark.exists) == 137
        assert time.monotonic() - started < 20


def test_an_audit_holds_its_lock_after_its_watch_is_killed(tmp_path: Path) -> None:
    lines = f"""
from pathlib import Path
from disthess.schedules.runner import ProcessRunner
from disthess.schedules.state import held
with held(Path({str(tmp_path / "lock")!r})) as lock:
    ProcessRunner(["sh", "-c", "echo $$ > {tmp_path / "pid"}; exec sleep 60"], Path("/")).run(60, lock, lambda: False)
"""
    process = subprocess.Popen([sys.executable, "-c", lines])
    pid = tmp_path / "pid"
    while not (pid.exists() and pid.read_text().strip()):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    audit = int(pid.read_text())
    with pytest.raises(StoreError), held(tmp_path / "lock"):
        pass
    os.kill(audit, signal.SIGKILL)
    for _ in range(200):
        try:
            with held(tmp_path / "lock"):
                return
        except StoreError:
            time.sleep(0.02)
    raise AssertionError("the lock was not given back")


def test_the_command_watches_for_real_and_ends_on_sigterm(tmp_path: Path) -> None:
    """Every second, by this machine's clock; `disthess audit` is a stand-in that writes down its words."""
    (tmp_path / "audit.yaml").write_text("problem: {factory: 'a:b'}\nhistory: h.zarr\n")
    script = (
        "import sys; from pathlib import Path; from disthess.schedules import runner; "
        f"runner.ProcessRunner.of_audit = classmethod(lambda kind, words, folder: kind([sys.executable, '-c', "
        f"'import sys; open(\\'{tmp_path}/ran\\', \\'a\\').write(str(sys.argv[1:]) + chr(10))', *words], folder)); "
        "from disthess.cli.main import main; main()"
    )
    words = ["schedule", str(tmp_path / "audit.yaml"), "--cron", "* * * * * *", "--watch", "--timezone", "UTC"]
    process = subprocess.Popen([sys.executable, "-c", script, *words], stderr=subprocess.PIPE, text=True)
    ran = tmp_path / "ran"
    until = time.monotonic() + 60
    while not (ran.exists() and len(ran.read_text().splitlines()) >= 2):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 0
    assert ran.read_text().splitlines()[0] == str(["audit", str(tmp_path / "audit.yaml")])
    assert "the audit is done" in said
    assert json.loads((tmp_path / "audit.schedule.json").read_text())["exit_code"] == 0
