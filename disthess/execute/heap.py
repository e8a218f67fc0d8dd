"""Freed memory stays with the process while tiles are computed.

A sweep allocates and frees stacks of the same sizes thousands of times. By default glibc gives the top of the heap back to the
kernel as soon as a few stacks are free, and every entry of the next one costs a page fault first: up to a third of the time of
small convolutional networks. Elsewhere (musl, macOS, Windows) nothing is changed.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import final

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3

_MAPPED_BYTES = 32 << 20
"""Blocks of so many bytes are mapped alone and go back to the kernel when freed: the most that glibc allows."""

_KEPT_BYTES = (1 << 31) - 1
"""Free memory at the top of the heap that is kept; an int in glibc."""

_USUAL_BYTES = 2 * _MAPPED_BYTES
"""What glibc itself comes to keep, once blocks of ``_MAPPED_BYTES`` have been freed."""


@final
class KeptHeap:
    """Keeps freed memory from now until `restore`, which gives it back.

    >>> heap = KeptHeap()
    >>> heap.restore()
    """

    def __init__(self) -> None:
        set_option = _function("mallopt")
        if set_option is not None:
            set_option(_MMAP_THRESHOLD, _MAPPED_BYTES)
            set_option(_TRIM_THRESHOLD, _KEPT_BYTES)

    def give_back(self) -> None:
        """Return what is free now to the kernel, and go on keeping: before trying again what did not fit."""
        trim = _function("malloc_trim")
        if trim is not None:
            trim(0)

    def restore(self) -> None:
        """Keep no more than glibc does by itself, and return what is free."""
        set_option = _function("mallopt")
        if set_option is not None:
            set_option(_TRIM_THRESHOLD, _USUAL_BYTES)
            self.give_back()


@functools.cache
def _function(name: str) -> Callable[..., int] | None:
    try:
        library = ctypes.CDLL(None)
        if not hasattr(library, "gnu_get_libc_version"):
            return None
        return getattr(library, name, None)
    except (OSError, TypeError):
        return None
