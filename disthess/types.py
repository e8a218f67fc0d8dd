"""Words shared by every layer. One word, one thing; ranges are half-open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Part = Literal["hessian", "ggn", "residual"]
"""``hessian``; ``ggn`` (generalised Gauss-Newton); ``residual`` = hessian - ggn."""

PARTS: tuple[Part, ...] = ("hessian", "ggn", "residual")

DType = Literal["float32", "float64"]

ITEM_BYTES: dict[str, int] = {"float32": 4, "float64": 8}


@dataclass(frozen=True, slots=True)
class Span:
    """A half-open range ``[start, stop)`` of rows, columns or samples.

    >>> Span(2, 5).size
    3
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"a span needs 0 <= start <= stop, got [{self.start}, {self.stop})")

    @property
    def size(self) -> int:
        """Number of entries."""
        return self.stop - self.start
