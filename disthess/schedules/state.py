"""What a watch remembers between two lives: a small JSON file, replaced as a whole, and the locks beside it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from disthess.errors import ConfigError, HeldError, StoreError

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class WatchState:
    """What was done.

    Attributes:
        config: The audit file, its full path.
        done: The due times up to this moment have been dealt with.
        exit_code: Of the last audit; None before the first.
        finished: When it ended.
    """

    config: str
    done: datetime
    exit_code: int | None = None
    finished: datetime | None = None


def read_state(path: Path) -> WatchState | None:
    """The state in a file; None where there is no file.

    Raises:
        StoreError: It cannot be read, or is none.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StoreError(f"The state file {path} cannot be read ({error}). Name another by --state.") from error
    try:
        value = json.loads(text)
        if not isinstance(value, dict) or value.get("schema") != SCHEMA or not isinstance(value.get("config"), str):
            raise ValueError("it is not one that 'disthess schedule' writes")
        exit_code = value.get("exit_code")
        if exit_code is not None and (isinstance(exit_code, bool) or not isinstance(exit_code, int)):
            raise ValueError("its exit_code is no number")
        finished = value.get("finished")
        done = _moment(value.get("done"))
        return WatchState(value["config"], done, exit_code, None if finished is None else _moment(finished))
    except (ValueError, RecursionError) as error:
        raise StoreError(
            f"The state file {path} is damaged ({error}). Remove it, which forgets audits that were missed, or name another by "
            f"--state."
        ) from error


def write_state(path: Path, state: WatchState) -> None:
    """Write or replace the file, as a whole.

    Raises:
        StoreError: It cannot be written.
    """
    value = {
        "schema": SCHEMA,
        "config": state.config,
        "done": state.done.isoformat(),
        "exit_code": state.exit_code,
        "finished": None if state.finished is None else state.finished.isoformat(),
    }
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("w", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        raise StoreError(
            f"The state file {path} cannot be written ({error.strerror or error}). Name another by --state."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


@contextlib.contextmanager
def held(path: Path) -> Iterator[int]:
    """Hold the lock file; the system gives it back when the last process that has it open ends.

    Yields:
        Its descriptor, for a child that is to hold it too.

    Raises:
        HeldError: Another process holds it.
        ConfigError: It cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(
            f"the lock file {path} cannot be made ({error.strerror or error}). Name a state file in another folder by --state."
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise HeldError(f"Another process holds the lock {path}.") from error
        yield descriptor
    finally:
        os.close(descriptor)


def _moment(value: Any) -> datetime:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no time")
    moment = datetime.fromisoformat(value)
    if moment.tzinfo is None:
        raise ValueError(f"the time {value!r} has no zone")
    return moment.astimezone(UTC)
