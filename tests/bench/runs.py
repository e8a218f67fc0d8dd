"""One timed run of ``disthess.compute``, with the time of its stages.

The stages come from the events of the executor. ``compute`` shows them to a progress listener alone, so that for the time of a
run a stopwatch takes that listener's place; nothing else of the run changes.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final
from unittest import mock

import disthess
from disthess import api
from disthess.execute.events import Event, RunStarted, TileDone
from disthess.reduce.hessian_store import HessianStore


@dataclass(frozen=True, slots=True)
class Crew:
    """Who computes: ``executor`` is serial, threads, processes or ray, with so many workers of so many threads."""

    executor: str
    workers: int
    threads: int

    @property
    def name(self) -> str:
        """For tables."""
        noun = "thread" if self.threads == 1 else "threads"
        if self.executor == "serial":
            return f"disthess, {self.threads} {noun}"
        kind = "Ray" if self.executor == "ray" else self.executor
        return f"disthess, {kind} {self.workers} x {self.threads} {noun}"

    @property
    def options(self) -> dict[str, Any]:
        """For ``disthess.compute``."""
        workers = {} if self.executor == "serial" else {"workers": self.workers}
        return {"executor": self.executor, "threads": self.threads, **workers}


@dataclass(frozen=True, slots=True)
class Run:
    """Seconds of one run.

    Attributes:
        seconds: End to end: from the problem to the certified store.
        prepare: Until the executor starts: checks, capture, plan, the empty store.
        start: Until the first tile begins: workers, and Ray with its processes, which a run starts and ends itself.
        tiles: From the begin of the first tile to the end of the last.
        finish: The rest: Ray's end, sums of shared parameters, gradient, kinks, certificate.
        busy: Sum over tiles of computing and writing them, as in the ledger; of all workers.
        written_bytes: Bytes of all tiles.
        tile_seconds: The terms of ``busy``, by number of the tile.
    """

    seconds: float
    prepare: float
    start: float
    tiles: float
    finish: float
    busy: float
    written_bytes: int
    tile_seconds: tuple[float, ...]

    @property
    def stages(self) -> dict[str, float]:
        """Everything that is in seconds, without the single tiles."""
        return {key: value for key, value in asdict(self).items() if key not in ("written_bytes", "tile_seconds")}


@final
class Stopwatch:
    """Listens to a run, and keeps when the executor started and when tiles began and ended, on this process's clock."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()
        self.started = 0.0
        self.first = float("inf")
        self.last = 0.0

    def notify(self, event: Event) -> None:
        """Take note of an event."""
        now = time.perf_counter()
        if isinstance(event, RunStarted):
            self.started = now
        elif isinstance(event, TileDone):
            # The clock of another process need not be this one's: its tile began so long before it was reported.
            self.first = min(self.first, now - event.record.seconds)
            self.last = now

    def stop(self, store: HessianStore) -> Run:
        """The run that ends now."""
        end = time.perf_counter()
        records = sorted(store.store.records(), key=lambda record: record.tile)
        return Run(
            seconds=end - self.begin,
            prepare=self.started - self.begin,
            start=self.first - self.started,
            tiles=self.last - self.first,
            finish=end - self.last,
            busy=sum(record.seconds for record in records),
            written_bytes=sum(record.written_bytes for record in records),
            tile_seconds=tuple(record.seconds for record in records),
        )


def compute(
    problem: disthess.Problem, crew: Crew, dtype: str, look: Callable[[HessianStore], Any] = lambda _: None
) -> tuple[Run, Any]:
    """Compute a Hessian into a store in a temporary folder.

    Args:
        problem: The problem.
        crew: Who computes. Ray is started inside, as users get it who give no address.
        dtype: ``float32`` or ``float64``.
        look: Shown the store after the clock has stopped, before it is removed.

    Returns:
        The times, and what ``look`` returned.
    """
    with tempfile.TemporaryDirectory() as folder:
        watch = Stopwatch()
        with mock.patch.object(api, "make_progress", return_value=watch):
            store = disthess.compute(problem, Path(folder) / "x.zarr", dtype=dtype, progress=False, **crew.options)
        return watch.stop(store), look(store)


def median_stages(runs: Sequence[Run]) -> dict[str, float]:
    """Median of every stage over runs, each by itself."""
    return {key: statistics.median(run.stages[key] for run in runs) for key in runs[0].stages}
