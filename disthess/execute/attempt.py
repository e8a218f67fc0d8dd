"""One attempt at a tile, with its errors turned into values: they cross processes, and only the driver decides."""

from __future__ import annotations

import errno
import traceback
from dataclasses import dataclass

from disthess.errors import DisthessError, PlanError, StoreError
from disthess.execute.task import AbstractWorker
from disthess.store.layout import Tile, TileRecord
from disthess.units import human_bytes

_LONGEST = 400
_HOPELESS = (StoreError, PlanError)
_MEMORY_WORDS = (
    "DefaultCPUAllocator",
    "can't allocate memory",
    "Cannot allocate memory",
    "out of memory",
    "std::bad_alloc",
)


@dataclass(frozen=True, slots=True)
class Failure:
    """An attempt that raised.

    Attributes:
        message: One short paragraph.
        hopeless: The error itself where no other tile and no other worker would fare better, such as a full disk.
        memory: Whether memory ran out, so that the same tile may go well with less at a time.
    """

    message: str
    hopeless: DisthessError | None = None
    memory: bool = False


def death(*, memory: bool) -> Failure:
    """What the end of a worker's process means for the run."""
    if memory:
        return Failure(
            "its worker was ended because the machine ran out of memory; use fewer workers or a smaller memory budget",
            memory=True,
        )
    return Failure("the process of its worker died (killed, crashed, or out of memory)")


def attempt_tile(worker: AbstractWorker, tile: Tile, split: int = 0) -> TileRecord | Failure:
    """Compute a tile, halved ``split`` times; exceptions come back as values, a keyboard interrupt does not."""
    try:
        return worker.compute(tile, split)
    except Exception as error:
        return failure_of(error, tile)


def failure_of(error: Exception, tile: Tile | None) -> Failure:
    """What an exception means for the run.

    >>> failure_of(ValueError("no"), None).message
    'ValueError: no'
    """
    if _is_out_of_memory(error):
        planned = f" (planned: {human_bytes(tile.memory_bytes)} for this tile)" if tile and tile.memory_bytes else ""
        return Failure(
            f"the worker ran out of memory{planned}: {describe(error)}. Use fewer workers, smaller batches, or a smaller "
            f"memory budget.",
            memory=True,
        )
    if isinstance(error, DisthessError):
        return Failure(str(error), error if isinstance(error, _HOPELESS) else None)
    return Failure(f"{describe(error)}{_place(error)}")


def describe(error: BaseException) -> str:
    """Class and first line of an exception."""
    text = str(error).strip()
    first = text.splitlines()[0][:_LONGEST] if text else ""
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _MEMORY_WORDS):
        return True
    return error.__cause__ is not None and _is_out_of_memory(error.__cause__)


def _place(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f" (in {frames[-1].name}, {frames[-1].filename}:{frames[-1].lineno})" if frames else ""
