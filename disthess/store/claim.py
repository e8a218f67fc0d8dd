"""Who holds a lease: what a process says of itself, and what another can tell from that."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
import uuid
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import psutil

from disthess.store.place import AbstractPlace


@dataclass(frozen=True, slots=True)
class Claim:
    """One process's claim of a lease.

    Attributes:
        token: Its name, never used again.
        host: Name of the machine.
        boot: What the kernel calls its run since the last start; empty where it says nothing.
        pids: Which namespace the process number belongs to; containers have their own.
        pid: Number of the process.
        started: When the process started, seconds since 1970.
        since: When the claim was made, for people.
        monotonic: When the claim was made, seconds by the clock that all processes since that start share.
        released: Whether it only ends a lease that is being given back.
    """

    token: str
    host: str = ""
    boot: str = ""
    pids: str = ""
    pid: int | None = None
    started: float = 0.0
    since: str = ""
    monotonic: float = 0.0
    released: bool = False

    @classmethod
    def make(cls, released: bool = False) -> Claim:
        """A new claim of this process."""
        process = psutil.Process()
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            boot=_boot(),
            pids=_process_space(),
            pid=process.pid,
            started=process.create_time(),
            since=time.strftime("%Y-%m-%d %H:%M:%S%z"),
            monotonic=time.monotonic(),
            released=released,
        )

    @property
    def who(self) -> str:
        """For messages."""
        if self.pid is None:
            return "somebody unknown (the lock cannot be read)"
        return f"process {self.pid} on host {self.host}, since {self.since}"

    def to_bytes(self) -> bytes:
        """As it is stored."""
        return json.dumps(asdict(self)).encode()

    def is_dead(self, beat: bytes | None, stale_seconds: float) -> bool | None:
        """True if this process has the means to know that the claim's is gone, False if it lives, None if it cannot know.

        Args:
            beat: The claim's latest heartbeat, if there is one.
            stale_seconds: How old a heartbeat by the same clock may be.
        """
        if (self.host, self.boot, self.pids) == (socket.gethostname(), _boot(), _process_space()) and self._is_gone():
            return True
        if not self.boot or self.boot != _boot():
            return None
        age = time.monotonic() - max(self.monotonic, _beat_time(beat))
        return age > stale_seconds

    def _is_gone(self) -> bool:
        if self.pid is None:
            return False
        try:
            process = psutil.Process(self.pid)
            return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - self.started) > 2.0
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False


def make_beat() -> bytes:
    """A heartbeat: no two of a process are the same."""
    return json.dumps({"monotonic": time.monotonic(), "beat": uuid.uuid4().hex}).encode()


def read_claim(place: AbstractPlace, key: str) -> Claim | None:
    """The claim stored under a key; one that cannot be read is somebody's all the same."""
    text = place.read(key)
    if text is None:
        return None
    unknown = Claim(token=hashlib.sha256(text).hexdigest()[:32])
    try:
        given = json.loads(text)
        claim = Claim(**{name: given[name] for name in Claim.__dataclass_fields__ if name in given})
    except (ValueError, TypeError):
        return unknown
    numbers = (claim.pid, claim.started, claim.monotonic)
    is_whole = all(isinstance(value, (int, float)) for value in numbers)
    return claim if is_whole and isinstance(claim.token, str) and claim.token.isalnum() else unknown


def _beat_time(beat: bytes | None) -> float:
    try:
        return float(json.loads(beat or b"{}").get("monotonic", 0.0))
    except (ValueError, TypeError, AttributeError):
        return 0.0


@cache
def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


@cache
def _process_space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
