"""Whether a number has changed: the difference of two estimates, its interval, and how likely chance alone would make it so large.

An interval of confidence c below 1 stands for a normal error of standard deviation (its side) / z, with P(|Z| < z) = c; one of
confidence 1 is a pair of bounds, taken as they are. Of an interval the side that faces the other number counts. With d the
difference, s its standard error and b the sum of the bounds,

    p = P(|Z| > (|d| - b) / s)        for the difference of two estimates
    p = P(|T| > (|d| - b) / s)        for one against n earlier ones, T of Student's distribution

Positive numbers with intervals symmetric in their logarithms are compared by the difference of these.

Exact numbers have s = b = 0: any difference then has p = 0. Estimates made from the same random vectors have errors in common,
which makes the true p smaller than this one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri, stdtr, stdtrit

from disthess.audits.record import Estimate

SHOWN_CONFIDENCE = 0.95
"""Of the interval of a difference."""


@dataclass(frozen=True, slots=True)
class Change:
    """From one number to another.

    Attributes:
        before: The earlier number, or the mean of several.
        after: The later one.
        difference: ``after - before``.
        relative: ``difference / |before|``; infinite from zero, and 0 where both are.
        low: Lower end of the interval of the difference.
        high: Upper end.
        confidence: Of the interval; 1 where only bounds or exact numbers went into it.
        p: Two-sided; of a difference at least as large by chance alone. NaN where a number is not finite.
    """

    before: float
    after: float
    difference: float
    relative: float
    low: float
    high: float
    confidence: float
    p: float


@dataclass(frozen=True, slots=True)
class LogEstimate:
    """A positive number whose interval is symmetric in its logarithm.

    Attributes:
        value: The number.
        low: Lower end.
        high: Upper end.
        confidence: Of the interval, by Student's distribution; NaN where it is not known.
        freedom: Degrees of freedom of that; NaN likewise.
    """

    value: float
    low: float
    high: float
    confidence: float
    freedom: float

    @property
    def exact(self) -> bool:
        """Whether the interval is a point."""
        return self.low == self.value == self.high

    @property
    def variance(self) -> float:
        """Of the logarithm."""
        if self.exact:
            return 0.0
        if not (self.low > 0 and math.isfinite(self.high)):
            return math.inf
        return (0.5 * math.log(self.high / self.low) / _quantile(self.confidence, self.freedom)) ** 2


@dataclass(frozen=True, slots=True)
class Ratio:
    """Of two numbers.

    Attributes:
        value: The later over the earlier.
        low: Lower end of its interval.
        high: Upper end.
        p: Two-sided; of a ratio at least as far from 1 by chance alone. NaN where the intervals' worth is not known.
    """

    value: float
    low: float
    high: float
    p: float


def ratio_between(old: LogEstimate, new: LogEstimate, confidence: float = SHOWN_CONFIDENCE) -> Ratio:
    """The ratio of two estimates of which one at least has an error; the errors taken as independent.

    >>> old, new = LogEstimate(0.1, 0.05, 0.2, 0.95, math.inf), LogEstimate(0.4, 0.2, 0.8, 0.95, math.inf)
    >>> found = ratio_between(old, new)
    >>> round(found.value, 3), round(found.low, 3), round(found.high, 3), round(found.p, 4)
    (4.0, 1.501, 10.661, 0.0056)
    """
    value = new.value / old.value
    parts = [one.variance for one in (old, new)]
    variance = sum(parts)
    if math.isnan(variance):
        return Ratio(value, math.nan, math.nan, math.nan)
    if math.isinf(variance):
        return Ratio(value, 0.0, math.inf, 1.0)
    # Welch and Satterthwaite.
    spent = sum(part**2 / one.freedom for part, one in zip(parts, (old, new), strict=True) if part)
    freedom = variance**2 / spent if spent else math.inf
    error = math.sqrt(variance)
    p = 2 * _tail(abs(math.log(value)) / error, freedom)
    reach = math.exp(_quantile(confidence, freedom) * error)
    return Ratio(value, value / reach, value * reach, min(p, 1.0))


def change_between(
    old: Estimate, new: Estimate, confidence: float = SHOWN_CONFIDENCE, *, freedom: float = math.inf
) -> Change:
    """The change from one estimate to another, their errors taken as independent.

    ``freedom`` are the degrees of freedom of what errors are known by, where these are few.

    >>> old = Estimate("trace", "", 10.0, 9.0, 11.0, 0.95, "")
    >>> new = Estimate("trace", "", 12.0, 11.0, 13.0, 0.95, "")
    >>> found = change_between(old, new)
    >>> round(found.relative, 3), round(found.low, 3), round(found.high, 3), round(found.p, 4)
    (0.2, 0.586, 3.414, 0.0056)
    """
    (error_old, bound_old), (error_new, bound_new) = _towards(old, new.value), _towards(new, old.value)
    return _change(old.value, new.value, math.hypot(error_old, error_new), bound_old + bound_new, freedom, confidence)


def change_since(earlier: Sequence[Estimate], new: Estimate, confidence: float = SHOWN_CONFIDENCE) -> Change:
    """The change from the mean of earlier estimates to a new one, judged by how much the earlier ones scatter.

    With ``s^2`` their variance about the mean and ``n`` of them, the new number lies within ``t s sqrt(1 + 1/n)`` of the mean
    (a prediction interval, Student's t with ``n - 1`` degrees of freedom). Where the new interval is wider than theirs, what
    its variance has beyond the mean of theirs is added, with degrees of freedom by Welch and Satterthwaite.

    Raises:
        ValueError: Fewer than two earlier estimates.
    """
    if len(earlier) < 2:
        raise ValueError(f"a scatter needs two numbers at least, got {len(earlier)}")
    values = np.array([estimate.value for estimate in earlier])
    mean = float(values.mean())
    error, bound = _towards(new, mean)
    errors, bounds = np.array([_towards(estimate, new.value) for estimate in earlier]).T
    scatter = float(values.var(ddof=1)) * (1 + 1 / len(values)) if np.ptp(values) > 0 else 0.0
    excess = max(0.0, error**2 - float((errors**2).mean())) if math.isfinite(error) else math.inf
    variance = scatter + excess
    freedom = math.inf
    if scatter > 0 and math.isfinite(variance):
        freedom = (len(values) - 1) * (variance / scatter) ** 2
    return _change(mean, new.value, math.sqrt(variance), bound + float(bounds.mean()), freedom, confidence)


def asserted(chances: Sequence[float], significance: float) -> frozenset[int]:
    """Places of those that are more than chance, by Holm's rule: the probability that any of them is false is at most that.

    The k-th smallest p of m must be below ``significance / (m - k + 1)``, and all smaller ones too. It holds however they depend on
    each other.

    >>> sorted(asserted([0.03, 0.001, 0.2, 0.004], 0.05))
    [1, 3]
    """
    found: list[int] = []
    for place, (p, index) in enumerate(sorted((p, index) for index, p in enumerate(chances))):
        if p * (len(chances) - place) >= significance:
            break
        found.append(index)
    return frozenset(found)


def _change(before: float, after: float, error: float, bound: float, freedom: float, confidence: float) -> Change:
    difference = after - before
    if difference == 0:
        relative = 0.0
    else:
        relative = difference / abs(before) if before else math.copysign(math.inf, difference)
    if not (math.isfinite(before) and math.isfinite(after)):
        nan = math.nan
        return Change(before, after, difference, nan, nan, nan, confidence, nan)
    beyond = abs(difference) - bound
    if error > 0:
        p = 2 * _tail(max(beyond, 0.0) / error, freedom) if math.isfinite(error) else 1.0
    else:
        p = 0.0 if beyond > 0 else 1.0
    half = bound + (_quantile(confidence, freedom) * error if error else 0.0)
    known = 1.0 if error == 0 else confidence
    return Change(before, after, difference, relative, difference - half, difference + half, known, min(p, 1.0))


def _towards(estimate: Estimate, other: float) -> tuple[float, float]:
    """Standard error and bound of an estimate, by the side of its interval that faces another number."""
    side = estimate.high - estimate.value if other > estimate.value else estimate.value - estimate.low
    if math.isnan(side):
        return math.inf, 0.0
    side = max(side, 0.0)
    if not 0 < estimate.confidence < 1:
        return (0.0, side) if math.isfinite(side) else (math.inf, 0.0)
    return side / _quantile(estimate.confidence, math.inf), 0.0


def _tail(distance: float, freedom: float) -> float:
    return float(ndtr(-distance) if math.isinf(freedom) else stdtr(freedom, -distance))


def _quantile(confidence: float, freedom: float) -> float:
    share = (1 + confidence) / 2
    return float(ndtri(share) if math.isinf(freedom) else stdtrit(freedom, share))
