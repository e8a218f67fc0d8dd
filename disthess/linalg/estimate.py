"""One number about a matrix with its interval, as every table, history and alert takes it."""

from __future__ import annotations

from dataclasses import dataclass

WHOLE = ""
"""The block of an estimate that is about all parameters together."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """One number with its interval.

    Attributes:
        metric: What it is, for example ``lambda_max``; the names are those of `disthess.audits.metrics`.
        block: Of which block; `WHOLE` for all parameters together.
        value: The number; NaN where it is not defined.
        low: Lower end of its interval; the value itself where it is exact.
        high: Upper end.
        confidence: Of the interval; 1 where its ends are bounds.
        how: How it was computed, in a sentence.
    """

    metric: str
    block: str
    value: float
    low: float
    high: float
    confidence: float
    how: str

    @property
    def exact(self) -> bool:
        """Whether the interval is a point."""
        return self.low == self.value == self.high

    @property
    def half_width(self) -> float:
        """Half of the interval; NaN where it is not defined."""
        return 0.5 * (self.high - self.low)
