"""Showing how far a run is: a bar on a terminal, a line now and then elsewhere, or nothing.

Time left is the remaining projected operations over the measured rate; where a plan projects none, tiles are counted.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import TextIO, final

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from disthess.execute.events import Event, Listener, RunEnded, RunStarted, TileDone, TileFailed, WorkersChanged
from disthess.units import human_flops, human_seconds

_LINE_SECONDS = 5.0


@dataclass(slots=True)
class Tally:
    """Running numbers of a run; ``clock`` is in seconds.

    >>> tally = Tally(tiles=4, work=400, begin=10.0)
    >>> tally.done, tally.work_done = 1, 100
    >>> tally.left_seconds(12.0), tally.describe_rate(12.0)
    (6.0, '50 FLOP/s')
    """

    tiles: int = 0
    work: int = 0
    begin: float = 0.0
    done: int = 0
    failed: int = 0
    work_done: int = 0
    counts_flops: bool = True
    idle_workers: str = ""

    @classmethod
    def of(cls, event: RunStarted, clock: float) -> Tally:
        """Numbers at the start."""
        return cls(event.tiles, event.flops or event.tiles, clock, counts_flops=event.flops > 0)

    def add(self, event: Event) -> None:
        """Take note of an event."""
        if isinstance(event, TileDone):
            self.done += 1
            self.work_done += event.tile.flops if self.counts_flops else 1
        elif isinstance(event, TileFailed) and event.final:
            self.failed += 1
        elif isinstance(event, WorkersChanged):
            few = event.working < event.wanted
            self.idle_workers = f", {event.working} of {event.wanted} workers" if few else ""

    def left_seconds(self, clock: float) -> float | None:
        """Time left at the rate so far; None before the first tile."""
        if self.work_done == 0:
            return None
        return (clock - self.begin) * (self.work - self.work_done) / self.work_done

    def describe_rate(self, clock: float) -> str:
        """The rate so far, in words."""
        elapsed = clock - self.begin
        if elapsed <= 0 or self.work_done == 0:
            return "-"
        rate = self.work_done / elapsed
        return f"{human_flops(rate)}/s" if self.counts_flops else f"{rate:.1f} tiles/s"


@final
class SilentProgress:
    """Shows nothing."""

    def notify(self, event: Event) -> None:
        """Take note of an event."""


@final
class LineProgress:
    """A line every few seconds, and one at the end; for logs."""

    def __init__(self, stream: TextIO, every_seconds: float = _LINE_SECONDS) -> None:
        self._stream = stream
        self._every = every_seconds
        self._tally = Tally()
        self._last = 0.0

    def notify(self, event: Event) -> None:
        """Take note of an event."""
        now = time.monotonic()
        if isinstance(event, RunStarted):
            self._tally, self._last = Tally.of(event, now), now
            before = f", {event.done_before} done before" if event.done_before else ""
            workers = f"{event.workers} worker{'s' if event.workers > 1 else ''}"
            self._print(f"computing {event.tiles} tiles{before}, {human_flops(event.flops)}, {workers}")
            return
        self._tally.add(event)
        if isinstance(event, TileFailed):
            self._print(describe_failure(event))
        elif isinstance(event, RunEnded):
            self._print(describe_end(event))
        elif now - self._last >= self._every:
            self._last = now
            self._print(
                f"{self._tally.done}/{self._tally.tiles} tiles, {self._tally.describe_rate(now)}, "
                f"{human_seconds(self._tally.left_seconds(now))} left{self._tally.idle_workers}"
            )

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


@final
class RichProgress:
    """A bar with tiles, rate and time left, on a terminal; it is gone when the run ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tally = Tally()
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def notify(self, event: Event) -> None:
        """Take note of an event."""
        now = time.monotonic()
        if isinstance(event, RunStarted):
            self._start(event, now)
            return
        self._tally.add(event)
        if isinstance(event, TileFailed):
            self._console.print(describe_failure(event), markup=False, highlight=False)
        if self._bar is not None:
            self._bar.update(
                self._task,
                completed=self._tally.work_done,
                tiles=f"{self._tally.done}/{self._tally.tiles} tiles",
                rate=self._tally.describe_rate(now),
                left=f"{human_seconds(self._tally.left_seconds(now))} left{self._tally.idle_workers}",
            )
        if isinstance(event, RunEnded):
            if self._bar is not None:
                self._bar.stop()
                self._bar = None
            self._console.print(describe_end(event), markup=False, highlight=False)

    def _start(self, event: RunStarted, now: float) -> None:
        self._tally = Tally.of(event, now)
        columns = (
            TextColumn("tiles"),
            BarColumn(),
            TextColumn("{task.fields[tiles]}"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self._bar = Progress(*columns, console=self._console, transient=True)
        self._task = self._bar.add_task(
            "tiles", total=self._tally.work, tiles=f"0/{event.tiles} tiles", rate="-", left="? left"
        )
        self._bar.start()


def make_progress(mode: bool | None = None, stream: TextIO | None = None) -> Listener:
    """The listener that suits a stream.

    Args:
        mode: True for a bar on a terminal and lines elsewhere; False for nothing; None for a bar on a terminal and nothing
            elsewhere.
        stream: Standard error if None.
    """
    out = sys.stderr if stream is None else stream
    if mode is False:
        return SilentProgress()
    if out.isatty():
        return RichProgress(Console(file=out))
    return LineProgress(out) if mode else SilentProgress()


def describe_failure(event: TileFailed) -> str:
    """One line for a failed attempt."""
    what = "given up" if event.final else "will be tried again"
    if event.split:
        what = f"will be tried again in smaller pieces, halved {event.split} time{'s' if event.split > 1 else ''}"
    counted = f", attempt {event.attempts}" if event.attempts else ""
    return f"tile {event.tile.index} ({event.tile.place}) failed ({what}{counted}): {event.message}"


def describe_end(event: RunEnded) -> str:
    """One line for the end."""
    failed = f", {event.failed} given up" if event.failed else ""
    stopped = ", stopped by a signal" if event.stopped else ""
    split = f", {event.split} split for memory" if event.split else ""
    return f"{event.finished} tiles in {human_seconds(event.seconds)}{split}{failed}{stopped}"
