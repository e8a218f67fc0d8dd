"""A loop that runs an audit whenever it is due, for a machine that has no other scheduler.

- One audit at a time: a due time that comes while an audit runs is left out, as other schedulers leave it out.
- A due time that passed while nobody watched, or while the machine slept, is made up for once, however many there were.
- What is due is told from the clock at every look, so that a clock that is set, or that changes to summer time, is followed.
  If the clock is set back, nothing is run again, and waiting starts anew.
- A due time counts as dealt with when its audit has ended. If the watch is killed meanwhile, the audit goes on by itself; the
  next watch waits for its end, and then runs one more, which finds its checkpoint in the history.
"""

from __future__ import annotations

import abc
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import final

from typing_extensions import override

from disthess.errors import ConfigError, HeldError
from disthess.schedules.cron import Cron
from disthess.schedules.runner import KILLED, AbstractRunner
from disthess.schedules.state import WatchState, held, read_state, write_state

LOOK_SECONDS = 30.0
"""Longest time between two looks at the clock."""

SET_BACK = timedelta(minutes=2)
"""A clock that is this much earlier than what has been done was set back."""


class AbstractClock(abc.ABC):
    """What time it is, and waiting."""

    @abc.abstractmethod
    def now(self) -> datetime:
        """The time, in UTC."""

    @abc.abstractmethod
    def wait(self, seconds: float, ended: threading.Event) -> None:
        """Return after so many seconds, or when the event is set."""


@final
class SystemClock(AbstractClock):
    """This machine's."""

    @override
    def now(self) -> datetime:
        return datetime.now(UTC)

    @override
    def wait(self, seconds: float, ended: threading.Event) -> None:
        ended.wait(seconds)


@final
class Watch:
    """One watch. ``run`` does not return until it is asked to end.

    Args:
        config: The audit file.
        cron: When it is due.
        zone: Of the expression.
        state: The file that remembers; its locks lie beside it.
        runner: Runs an audit.
        deadline_seconds: Of one audit.
        clock: What time it is.
        say: Is given a sentence whenever something happens.
    """

    def __init__(
        self,
        config: Path,
        cron: Cron,
        zone: tzinfo,
        state: Path,
        runner: AbstractRunner,
        deadline_seconds: float,
        clock: AbstractClock,
        say: Callable[[str], None],
    ) -> None:
        self._config = str(config.absolute())
        self._cron = cron
        self._zone = zone
        self._file = state
        self._runner = runner
        self._deadline_seconds = deadline_seconds
        self._clock = clock
        self._say = say
        self._ended = threading.Event()
        self._cancelled = threading.Event()

    def end(self) -> None:
        """Ask it to end after the audit in flight; asked again, that audit is stopped. From a signal handler or a thread."""
        if self._ended.is_set():
            self._cancelled.set()
        self._ended.set()

    def run(self, *, once: bool = False) -> int:
        """Watch.

        Args:
            once: End after one audit.

        Returns:
            The exit code of that audit with ``once``, else 0.

        Raises:
            ConfigError: The state file belongs to another audit file, or another watch uses it.
            StoreError: The state file is damaged, or cannot be written.
        """
        try:
            with held(self._beside("watch")):
                return self._watch(once)
        except HeldError as error:
            raise ConfigError(
                f"another watch uses the state file {self._file} ({error}). End it, or name another file by --state."
            ) from error

    def _watch(self, once: bool) -> int:
        state = self._first_state()
        told: datetime | None = None
        while not self._ended.is_set():
            now = self._clock.now()
            if state.done - now > SET_BACK:
                self._say(f"the clock was set back to {self._shown(now)}; waiting from there")
                state = self._keep(replace(state, done=now))
            due = self._cron.latest_time(state.done, now, self._zone)
            if due is None:
                coming = self._cron.next_time(max(now, state.done), self._zone)
                if coming != told:
                    self._say(f"the next audit is due at {self._shown(coming)}")
                    told = coming
                self._clock.wait(min(LOOK_SECONDS, max(0.0, (coming - now).total_seconds())), self._ended)
                continue
            if now - due > timedelta(seconds=2 * LOOK_SECONDS):
                self._say(f"an audit was due at {self._shown(due)}, and is made up for now")
            code = self._audit()
            if code is None:
                break
            if self._cancelled.is_set():
                self._say("the audit was stopped before its end; the next watch begins with it")
                return code if once else 0
            # What came due meanwhile is left out, as by a scheduler that finds the last audit still running.
            ended = self._clock.now()
            state = self._keep(WatchState(self._config, max(ended, due), code, ended))
            self._say(_outcome(code))
            if once:
                return code
        return 0

    def _audit(self) -> int | None:
        """Run one; None where the end was asked for before it began."""
        waiting = False
        while not self._ended.is_set():
            try:
                with held(self._beside("audit")) as lock:
                    self._say("the audit starts")
                    return self._runner.run(self._deadline_seconds, lock, self._cancelled.is_set)
            except HeldError:
                if not waiting:
                    self._say("an audit of an earlier watch is still running; waiting for its end")
                waiting = True
                self._clock.wait(LOOK_SECONDS / 10, self._ended)
        return None

    def _first_state(self) -> WatchState:
        state = read_state(self._file)
        if state is None:
            return self._keep(WatchState(self._config, self._clock.now()))
        if state.config != self._config:
            raise ConfigError(
                f"the state file {self._file} belongs to the audit file {state.config}, not to {self._config}. Name "
                f"another by --state."
            )
        return state

    def _keep(self, state: WatchState) -> WatchState:
        write_state(self._file, state)
        return state

    def _beside(self, ending: str) -> Path:
        return self._file.with_name(f"{self._file.name}.{ending}.lock")

    def _shown(self, moment: datetime) -> str:
        return moment.astimezone(self._zone).isoformat(sep=" ", timespec="seconds")


def _outcome(code: int) -> str:
    said = {
        0: "the audit is done",
        3: "the audit is done and raised an alert (exit code 3)",
        KILLED: "the audit was stopped at its deadline",
    }
    return said.get(code, f"the audit failed with exit code {code}; it is tried again at the next due time")
