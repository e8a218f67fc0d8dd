"""Forked processes that compute tiles: copies of this process, with its model and values, that share their memory until written to.

A fork takes milliseconds where a fresh process takes seconds to load torch, and needs nothing to be sent. Torch's own data loader
works so, and what goes for it goes here: one thread of linear algebra each (thread pools do not survive a fork), no accelerator.
A child ends with its parent, whatever ends that.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import signal
import sys
import warnings
from collections.abc import Collection, Iterable
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, NoReturn, final

import psutil
import torch

from disthess.execute.attempt import Failure, attempt_tile, death
from disthess.execute.memory import PeakMemory, oom_kills
from disthess.execute.task import AbstractWorker
from disthess.store.layout import Tile, TileRecord

_PARENT_DEATH_SIGNAL = 1
"""Of Linux's prctl.h."""

_CLOSE_SECONDS = 3.0


def why_not() -> str:
    """Why this machine cannot have forked workers, in a sentence; empty where it can."""
    if sys.platform != "linux":
        return "processes are forked, which is safe on Linux alone"
    if torch.accelerator.is_available():
        return "torch sees an accelerator here, and its autograd does not survive a fork"
    return ""


@final
class Child:
    """One forked process, which answers one tile at a time.

    Args:
        worker: Open in this process; the child has its own copy of what it changes.

    Raises:
        OSError: The system has no room for another process.
    """

    def __init__(self, worker: AbstractWorker) -> None:
        self._connection, there = Pipe()
        parent = os.getpid()
        with warnings.catch_warnings():
            # Python warns of locks that other threads may hold: the child takes none of theirs, zarr makes its loop anew.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            self._connection.close()
            _serve(there, worker, parent)
        there.close()
        self._process = psutil.Process(child)

    @property
    def connection(self) -> Connection:
        """Ready when there is an answer, or the child has died."""
        return self._connection

    def ask(self, tile: Tile, split: int) -> None:
        """Have a tile computed, halved ``split`` times; a child that is dead is found so when its answer is taken."""
        with contextlib.suppress(OSError):
            self._connection.send((tile, split))

    def answer(self) -> TileRecord | Failure | None:
        """What became of the tile; None if the child has died."""
        try:
            found: TileRecord | Failure = self._connection.recv()
        except (EOFError, OSError):
            return None
        return found

    def end(self, *, at_once: bool) -> None:
        """Let the process end, or kill it."""
        with contextlib.suppress(OSError):
            self._connection.send(None)
        self._connection.close()
        try:
            self._process.wait(0 if at_once else _CLOSE_SECONDS)
        except psutil.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def first_ready(children: Iterable[Child]) -> Collection[Child]:
    """Those that have an answer, or have died; waits until there is one."""
    by_connection: dict[Any, Child] = {child.connection: child for child in children}
    return [by_connection[ready] for ready in wait(list(by_connection))]


@final
class Inquest:
    """Says why a child died: the kernel ends a process without a word, and counts those that it ends for want of memory."""

    def __init__(self) -> None:
        self._kills = oom_kills()

    def hold(self) -> Failure:
        """Why, in a sentence, and whether memory ran out."""
        before, self._kills = self._kills, oom_kills()
        return death(memory=self._kills > before)


def _serve(connection: Connection, worker: AbstractWorker, parent: int) -> NoReturn:
    """What a child does, to its end: nothing of its parent's is unwound, flushed or ended there."""
    code = 1
    try:
        # A stop is the parent's to decide: it lets tiles in flight finish, or kills.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        peak = PeakMemory()
        while os.getppid() == parent and (asked := connection.recv()) is not None:
            answer = attempt_tile(worker, *asked)
            if isinstance(answer, TileRecord):
                # What it shares with its parent is not its own.
                answer = dataclasses.replace(answer, peak_bytes=peak.rise_bytes())
            connection.send(answer)
        code = 0
    finally:
        os._exit(code)
