"""How much memory there is, and how much a process took at its peak."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import Self, final

import psutil

from disthess.execute.cgroup import cgroup_directories, read_text

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_SAMPLE_SECONDS = 0.005


def available_memory_bytes() -> int:
    """Memory this process may still take: what the machine has free, and what its control groups leave it (Linux)."""
    room = [int(psutil.virtual_memory().available)]
    for place in cgroup_directories():
        room.extend(_cgroup_room(place, "memory.max", "memory.current", "inactive_file"))
    old = Path("/sys/fs/cgroup/memory")
    room.extend(_cgroup_room(old, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))
    return max(0, min(room))


def oom_kills() -> int:
    """Processes that the kernel has ended for want of memory, in this process's control groups or else on the machine."""
    for place in cgroup_directories():
        if (text := read_text(place / "memory.events")) is not None:
            return _field(text, "oom_kill")
    return _field(read_text(Path("/proc/vmstat")) or "", "oom_kill")


@final
class PeakMemory:
    """Peak of this process's resident memory since now, above its level now.

    On Linux the kernel keeps the peak (``VmHWM``), which is reset at the start; of two watches in one process the earlier
    therefore sees no peak from before the later began. Elsewhere, or where the reset is not allowed, a thread samples.
    """

    def __init__(self) -> None:
        self._start = resident_bytes()
        self._highest = self._start
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        if not _reset_peak():
            self._thread = threading.Thread(target=self._sample, name="disthess-memory", daemon=True)
            self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def rise_bytes(self) -> int:
        """Highest resident memory so far, less that at the start."""
        now = _kernel_peak() if self._thread is None and not self._stopped.is_set() else resident_bytes()
        if not self._stopped.is_set():
            self._highest = max(self._highest, now or 0)
        return self._highest - self._start

    def close(self) -> None:
        """Stop watching; ``rise_bytes`` stays what it is."""
        self.rise_bytes()
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _sample(self) -> None:
        while not self._stopped.wait(_SAMPLE_SECONDS):
            self._highest = max(self._highest, resident_bytes())


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def peak_process_bytes() -> int | None:
    """Highest resident memory of this process since it began, libraries included (Linux); None where it is not known."""
    return _kernel_peak()


def _reset_peak() -> bool:
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return False
    return _kernel_peak() is not None


def _kernel_peak() -> int | None:
    for line in (read_text(_STATUS) or "").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_room(place: Path, limit_name: str, used_name: str, cache_name: str) -> list[int]:
    limit, used = read_text(place / limit_name), read_text(place / used_name)
    if limit is None or used is None or not limit.isdigit() or not used.isdigit():
        return []
    return [int(limit) - int(used) + _field(read_text(place / "memory.stat") or "", cache_name)]


def _field(text: str, wanted: str) -> int:
    """A line ``name value`` of a kernel file; 0 where there is none."""
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name == wanted:
            return int(value)
    return 0
