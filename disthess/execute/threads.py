"""How many threads each worker may use, so that workers do not fight over cores."""

from __future__ import annotations

import math
import os
from pathlib import Path

from disthess.execute.cgroup import cgroup_directories, read_text


def usable_cores() -> int:
    """Cores this process may use: its affinity, and the quotas of its control groups (Linux)."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, min([cores, *_quotas()]))


def default_threads(workers: int) -> int:
    """Threads per worker: usable cores over workers, at least one."""
    return max(1, usable_cores() // max(1, workers))


def parse_quota(text: str | None) -> int | None:
    """Cores of a ``cpu.max`` file, rounded up; None where there is no limit.

    >>> parse_quota("150000 100000"), parse_quota("max 100000")
    (2, None)
    """
    words = (text or "").split()
    if not words or not words[0].isdigit():
        return None
    period = int(words[1]) if len(words) > 1 else 100_000
    return max(1, math.ceil(int(words[0]) / period))


def _quotas() -> list[int]:
    texts = [read_text(place / "cpu.max") for place in cgroup_directories()]
    old = [read_text(Path(f"/sys/fs/cgroup/cpu/cpu.cfs_{name}_us")) for name in ("quota", "period")]
    if all(old):
        texts.append(" ".join(str(text) for text in old))
    return [quota for quota in map(parse_quota, texts) if quota is not None]
