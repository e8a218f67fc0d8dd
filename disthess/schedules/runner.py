"""Running one audit as a process of its own, with a deadline."""

from __future__ import annotations

import abc
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import final

from typing_extensions import override

from disthess.schedules.request import STOP_SECONDS

KILLED = 124
"""Exit code of an audit that was stopped at its deadline, as of ``timeout``."""

_POLL_SECONDS = 0.2


class AbstractRunner(abc.ABC):
    """Runs one audit."""

    @abc.abstractmethod
    def run(self, deadline_seconds: float, lock: int, is_cancelled: Callable[[], bool]) -> int:
        """Run it to its end.

        Args:
            deadline_seconds: After which it is stopped.
            lock: Descriptor of a lock that is to be held for as long as it lives, even if its caller dies.
            is_cancelled: Whether it should be stopped before its end.

        Returns:
            Its exit code, 128 and the number of the signal that ended it, or `KILLED` where it was stopped at the deadline.
        """


@final
class ProcessRunner(AbstractRunner):
    """A process in a session of its own, so that a Ctrl-C meant for the watch leaves it alone.

    Args:
        words: Its command line.
        folder: In which it runs.
        stop_seconds: Between SIGTERM and SIGKILL.
    """

    def __init__(self, words: list[str], folder: Path, stop_seconds: float = STOP_SECONDS) -> None:
        self._words = words
        self._folder = folder
        self._stop_seconds = stop_seconds

    @classmethod
    def of_audit(cls, words: list[str], folder: Path) -> ProcessRunner:
        """``disthess`` with these words, by this interpreter."""
        return cls([sys.executable, "-m", "disthess", *words], folder)

    @override
    def run(self, deadline_seconds: float, lock: int, is_cancelled: Callable[[], bool]) -> int:
        process = subprocess.Popen(
            self._words, cwd=self._folder, stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=(lock,)
        )
        until = time.monotonic() + deadline_seconds
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return _code(process.wait(_POLL_SECONDS))
            late = time.monotonic() > until
            if late or is_cancelled():
                self._stop(process)
                return KILLED if late else _code(process.returncode)

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        _signal(process, signal.SIGTERM)
        try:
            process.wait(self._stop_seconds)
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGKILL)
            process.wait()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """To the process and what it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _code(returned: int) -> int:
    return 128 - returned if returned < 0 else returned
