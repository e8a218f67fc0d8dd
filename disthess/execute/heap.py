"""Freed memory stays with the process while tiles or products are computed.

A sweep allocates and frees stacks of the same sizes thousands of times. By default glibc gives the top of the heap back to the
kernel as soon as a few stacks are free, and blocks of more than 32 MiB at once, and every entry of the next one costs a page fault
first: up to a third of the time of small convolutional networks, and of products of a vector of 20 million entries. Elsewhere
(musl, macOS, Windows) nothing is changed.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from typing import final

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4

_MAPPED_BYTES = 32 << 20
"""Blocks of so many bytes are mapped alone and go back to the kernel when freed: the most that glibc allows."""

_MAPPINGS = 1 << 16
"""Most blocks that glibc maps so."""

_KEPT_BYTES = (1 << 31) - 1
"""Free memory at the top of the heap that is kept; an int in glibc."""

_ALL_BYTES = -1
"""All of it: a block of vectors of a large model and its result are more than `_KEPT_BYTES`."""

_USUAL_BYTES = 2 * _MAPPED_BYTES
"""What glibc itself comes to keep, once blocks of ``_MAPPED_BYTES`` have been freed."""

_lock = threading.Lock()
_living: dict[int, bool] = {}


@final
class KeptHeap:
    """Keeps freed memory from now until `restore`, which gives it back where no other one keeps it.

    Args:
        large: Keep blocks of more than 32 MiB too: for products, whose vectors are such blocks again and again. Tiles are
            quicker without, since numpy gets its large arrays in large pages where they are mapped alone.

    >>> heap = KeptHeap()
    >>> heap.restore()
    """

    def __init__(self, *, large: bool = False) -> None:
        with _lock:
            _living[id(self)] = large
            _tell()

    def give_back(self) -> None:
        """Return what is free now to the kernel, and go on keeping: before trying again what did not fit."""
        trim = _function("malloc_trim")
        if trim is not None:
            trim(0)

    def restore(self) -> None:
        """Keep no more than the others do, or glibc by itself; what is free is returned if there are no others."""
        with _lock:
            if _living.pop(id(self), None) is None:
                return
            _tell()
            alone = not _living
        if alone:
            self.give_back()


def _tell() -> None:
    """What those that live want."""
    set_option = _function("mallopt")
    if set_option is not None:
        large = any(_living.values())
        set_option(_MMAP_MAX, 0 if large else _MAPPINGS)
        set_option(_MMAP_THRESHOLD, _MAPPED_BYTES)
        set_option(_TRIM_THRESHOLD, _ALL_BYTES if large else _KEPT_BYTES if _living else _USUAL_BYTES)


@functools.cache
def _function(name: str) -> Callable[..., int] | None:
    try:
        library = ctypes.CDLL(None)
        if not hasattr(library, "gnu_get_libc_version"):
            return None
        return getattr(library, name, None)
    except (OSError, TypeError):
        return None
