"""Signals, threads, memory and progress: what watches a run."""

from __future__ import annotations

import io
import os
import signal
import threading

import numpy as np
import pytest
from rich.console import Console

from disthess.execute import memory
from disthess.execute.events import RunEnded, RunStarted, TileDone, TileFailed
from disthess.execute.memory import PeakMemory, available_memory_bytes
from disthess.execute.progress import LineProgress, RichProgress, SilentProgress, Tally, make_progress
from disthess.execute.signals import stop_on_signals
from disthess.execute.threads import default_threads, parse_quota, usable_cores
from disthess.store.layout import Tile, TileRecord
from disthess.types import Span

MIB = 1 << 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_sets_the_flag_and_the_second_interrupts(number: int) -> None:
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert not stop.is_set
        os.kill(os.getpid(), number)
        assert stop.is_set
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_elsewhere_than_in_the_main_thread_handlers_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def body() -> None:
        with stop_on_signals() as stop:
            seen.append((stop.is_set, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def test_threads_are_shared_out() -> None:
    cores = usable_cores()
    assert 1 <= cores <= (os.cpu_count() or 1)
    assert default_threads(1) == cores
    assert default_threads(10 * cores) == 1
    assert parse_quota("50000 100000") == 1
    assert parse_quota("") is None
    assert parse_quota("400000") == 4


def _rise(watch: PeakMemory) -> int:
    block = np.ones(80 * MIB // 8)
    assert block[-1] == 1
    del block
    return watch.rise_bytes()


def test_the_peak_is_seen_after_it_is_gone() -> None:
    with PeakMemory() as watch:
        assert watch.rise_bytes() < 20 * MIB
        assert 70 * MIB < _rise(watch) < 110 * MIB
    assert watch.rise_bytes() > 70 * MIB
    with PeakMemory() as fresh:
        assert fresh.rise_bytes() < 20 * MIB


def test_the_sampling_thread_sees_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_reset_peak", lambda: False)
    with PeakMemory() as watch:
        block = np.ones(80 * MIB // 8)
        threading.Event().wait(0.1)
        del block
        assert 70 * MIB < watch.rise_bytes() < 110 * MIB


def test_available_memory_heeds_the_control_group(monkeypatch: pytest.MonkeyPatch, tmp_path: os.PathLike[str]) -> None:
    free = available_memory_bytes()
    assert free > MIB
    from pathlib import Path

    group = Path(tmp_path)
    (group / "memory.max").write_text(f"{5 * MIB}\n")
    (group / "memory.current").write_text(f"{4 * MIB}\n")
    (group / "memory.stat").write_text(f"anon 7\ninactive_file {MIB}\n")
    monkeypatch.setattr(memory, "cgroup_directories", lambda: [group])
    assert available_memory_bytes() == 2 * MIB
    (group / "memory.max").write_text("max\n")
    assert available_memory_bytes() > MIB


def _events(flops: int) -> tuple[RunStarted, TileDone, TileFailed, RunEnded]:
    tile = Tile(3, "fc1.weight", Span(0, 1), 0, 0, flops, 1, 1)
    record = TileRecord(3, 0, 0.0, 1, 1, 0)
    return (
        RunStarted(tiles=2, done_before=5, flops=2 * flops, written_bytes=2, workers=2),
        TileDone(record, tile),
        TileFailed(tile, "[bold]boom", 3, True),
        RunEnded(1, 1, True, 61.0),
    )


def test_lines_for_logs() -> None:
    stream = io.StringIO()
    progress = LineProgress(stream, every_seconds=0.0)
    for event in _events(10**9):
        progress.notify(event)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "computing 2 tiles, 5 done before, 2 GFLOP, 2 workers"
    assert lines[1].startswith("1/2 tiles, ")
    assert "FLOP/s" in lines[1]
    assert lines[2] == "tile 3 (fc1.weight, rows 0 to 0) failed (given up, attempt 3): [bold]boom"
    assert lines[3] == "1 tiles in 1 min 1 s, 1 given up, stopped by a signal"


def test_between_two_lines_some_time_passes() -> None:
    stream = io.StringIO()
    progress = LineProgress(stream, every_seconds=1000.0)
    started, done, _, _ = _events(1)
    progress.notify(started)
    for _ in range(100):
        progress.notify(done)
    assert len(stream.getvalue().splitlines()) == 1


def test_a_bar_on_a_terminal() -> None:
    stream = io.StringIO()
    progress = RichProgress(Console(file=stream, force_terminal=True, width=100))
    for event in _events(100):
        progress.notify(event)
    text = stream.getvalue()
    assert "1/2 tiles" in text
    assert "[bold]boom" in text
    assert "stopped by a signal" in text


def test_time_left_is_by_work_not_by_tiles() -> None:
    tally = Tally.of(RunStarted(10, 0, 1000, 0, 1), 100.0)
    assert tally.left_seconds(105.0) is None
    tally.add(TileDone(TileRecord(0, 0, 0.0, 0, 0, 0), Tile(0, "w", Span(0, 1), 0, 0, 800, 0, 0)))
    assert tally.left_seconds(108.0) == pytest.approx(2.0)
    assert tally.describe_rate(108.0) == "100 FLOP/s"


def test_without_projected_work_tiles_are_counted() -> None:
    tally = Tally.of(RunStarted(4, 0, 0, 0, 1), 0.0)
    tally.add(TileDone(TileRecord(0, 0, 0.0, 0, 0, 0), Tile(0, "w", Span(0, 1), 0, 0, 0, 0, 0)))
    assert tally.left_seconds(2.0) == pytest.approx(6.0)
    assert tally.describe_rate(2.0) == "0.5 tiles/s"


def test_the_stream_decides_what_is_shown() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert isinstance(make_progress(None, Terminal()), RichProgress)
    assert isinstance(make_progress(True, Terminal()), RichProgress)
    assert isinstance(make_progress(True, io.StringIO()), LineProgress)
    assert isinstance(make_progress(None, io.StringIO()), SilentProgress)
    assert isinstance(make_progress(False, Terminal()), SilentProgress)
