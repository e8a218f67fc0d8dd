"""One run at a time writes a store: a lock file beside it, with who holds it.

The file is created with ``O_EXCL``. A holder on this host that is dead is replaced in place, while the kernel's lock on the
file keeps two replacers apart; a holder on another host cannot be asked, so the message says how to remove the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final

import psutil

from disthess.errors import StoreError

_ATTEMPTS = 20


@final
class StoreLock:
    """Context manager that refuses a second run on the same store.

    Args:
        path: The store; it need not exist yet. The lock is ``{path}.lock``.

    Raises:
        StoreError: Another run holds it (on entering).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        place = Path(path).expanduser().absolute()
        self._store = place
        self._file = place.with_name(place.name + ".lock")
        self._token = ""

    def __enter__(self) -> Self:
        self._token = uuid.uuid4().hex
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            for _ in range(_ATTEMPTS):
                if self._create() or self._take_over():
                    return self
                time.sleep(0.01)
        except OSError as error:
            raise StoreError(
                f"The lock {self._file} cannot be written ({error.strerror or error}), so the store {self._store} cannot "
                f"be either. Check the permissions and the space of that directory."
            ) from error
        raise StoreError(
            f"The lock {self._file} keeps changing hands; other runs want the same store. Try again later."
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        holder = _read(self._file)
        if holder is not None and holder.get("token") == self._token and holder.get("pid") == os.getpid():
            self._file.unlink(missing_ok=True)

    def _create(self) -> bool:
        text = _holder(self._token)
        draft = self._file.with_name(f".{self._file.name}.{self._token}")
        draft.write_text(text, encoding="utf-8")
        try:
            os.link(draft, self._file)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            return self._create_exclusive(text)
        finally:
            draft.unlink(missing_ok=True)
        return True

    def _create_exclusive(self, text: str) -> bool:
        try:
            with self._file.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            return False
        return True

    def _take_over(self) -> bool:
        """Write our name over that of a dead holder; False where the file has gone meanwhile."""
        try:
            with self._file.open("r+", encoding="utf-8") as file, _kernel_lock(file.fileno()):
                if not _same_file(file.fileno(), self._file):
                    return False
                holder = _parse(file.read())
                if not _is_dead(holder):
                    raise StoreError(self._refusal(holder))
                file.seek(0)
                file.truncate()
                file.write(_holder(self._token))
                file.flush()
                return True
        except FileNotFoundError:
            return False

    def _refusal(self, holder: dict[str, Any] | None) -> str:
        if holder is None:
            who = "somebody unknown (the lock cannot be read)"
        else:
            who = f"process {holder.get('pid')} on host {holder.get('host')}, since {holder.get('since')}"
        return (
            f"The store {self._store} is being written by {who}. Two runs may not write one store: wait for it to end, "
            f"or choose another path. If you are sure that it no longer runs, remove {self._file} and run again."
        )


def _holder(token: str) -> str:
    process = psutil.Process()
    return json.dumps(
        {
            "host": socket.gethostname(),
            "pid": process.pid,
            "started": process.create_time(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S%z"),
            "token": token,
        }
    )


def _read(file: Path) -> dict[str, Any] | None:
    try:
        return _parse(file.read_text(encoding="utf-8"))
    except OSError:
        return None


def _parse(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _is_dead(holder: dict[str, Any] | None) -> bool:
    """Whether the holder is known to be gone; False where that cannot be known."""
    if holder is None or holder.get("host") != socket.gethostname() or not isinstance(holder.get("pid"), int):
        return False
    try:
        process = psutil.Process(holder["pid"])
        return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - float(holder["started"])) > 2.0
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, KeyError, ValueError):
        return False


def _same_file(descriptor: int, path: Path) -> bool:
    opened, named = os.fstat(descriptor), path.stat()
    return (opened.st_dev, opened.st_ino) == (named.st_dev, named.st_ino)


@contextlib.contextmanager
def _kernel_lock(descriptor: int) -> Iterator[None]:
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
