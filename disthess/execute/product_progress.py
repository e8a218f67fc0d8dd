"""Telling how many products have been done: to a function, or as a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO, TypeAlias, final

LINE_SECONDS = 5.0

ProductProgress: TypeAlias = bool | Callable[[int], None] | None
"""True for lines on standard error, a function that is called with the products done so far, or nothing."""


def product_listener(progress: ProductProgress) -> Callable[[int], None]:
    """What to call with the number of products done so far.

    >>> product_listener(None)(3)
    """
    if callable(progress):
        return progress
    return ProductLines(sys.stderr).notify if progress else lambda done: None


@final
class ProductLines:
    """A line every few seconds."""

    def __init__(self, stream: TextIO, every_seconds: float = LINE_SECONDS) -> None:
        self._stream = stream
        self._every = every_seconds
        self._begin = self._last = time.monotonic()

    def notify(self, done: int) -> None:
        """Print how many there are, and how long one takes on average, if the last line is old enough."""
        now = time.monotonic()
        if done < 1 or now - self._last < self._every:
            return
        self._last = now
        print(f"{done} products, {(now - self._begin) / done:.2g} s each", file=self._stream, flush=True)
