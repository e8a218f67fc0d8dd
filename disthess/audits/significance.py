"""Whether a number has changed: the difference of two estimates, its interval, and how likely chance alone would make it so large.

An interval of confidence c below 1 stands for an error that is normal in some scale. With P(|Z| < z) = c, u one of its sides and v
the other, that side at z' is

    u(z') = u z' / z                                       where u = v
    u(z') = u ((u / v)^(z' / z) - 1) / (u / v - 1)         otherwise: log(x + constant) is normal, as nearly for chi-squares

with u / v from 1 / 4 to 4; what is more lopsided is no law of errors, but a bound on one side. An interval of confidence 1 is a
pair of bounds, taken as they are. Of an interval the side that faces the other number counts. With d the difference and b the sum
of the bounds,

    p = P(|Z| > z'),  u_1(z')^2 + u_2(z')^2 = (|d| - b)^2       for the difference of two estimates (Zou and Donner 2008)
    p = P(|T| > (|d| - b) / s)                                 for one against n earlier ones, T of Student's distribution

where s is the standard error, u / z of the new number with the scatter of the earlier ones.

Positive numbers with intervals symmetric in their logarithms are compared by the difference of these.

Exact numbers have no sides: any difference then has p = 0. Estimates made from the same random vectors have errors in common,
which makes the true p smaller than this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri, stdtr, stdtrit

from disthess.audits.record import Estimate

SHOWN_CONFIDENCE = 0.95
"""Of the interval of a difference."""

LOPSIDED = 4.0
"""Ratio of an interval's sides up to which they tell how it grows; a chi-square of ten degrees of freedom has it."""

STRAIGHT = 1e-9
"""Logarithm of that ratio below which sides are equal."""

MOST_EXPONENT = 700.0
MOST_DEVIATE = 1e12
"""Beyond them numbers overflow, and no probability is left."""


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
    below = _together(_side(old, up=True), _side(new, up=False))
    above = _together(_side(old, up=False), _side(new, up=True))
    return _change(old.value, new.value, below, above, freedom, confidence)


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
    side = _side(new, up=mean > new.value)
    sides = [_side(estimate, up=new.value > estimate.value) for estimate in earlier]
    error, errors = side.reach(1.0), np.array([one.reach(1.0) for one in sides])
    scatter = float(values.var(ddof=1)) * (1 + 1 / len(values)) if np.ptp(values) > 0 else 0.0
    excess = max(0.0, error**2 - float((errors**2).mean())) if math.isfinite(error) else math.inf
    variance = scatter + excess
    freedom = math.inf
    if scatter > 0 and math.isfinite(variance):
        freedom = (len(values) - 1) * (variance / scatter) ** 2
    root = math.sqrt(variance)
    both = _Side(side.bound + float(np.mean([one.bound for one in sides])), lambda z: z * root)
    return _change(mean, new.value, both, both, freedom, confidence)


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


@dataclass(frozen=True, slots=True)
class _Side:
    """How far off a number may be on one side.

    Attributes:
        bound: For certain.
        reach: And beyond that at a deviate.
    """

    bound: float
    reach: Callable[[float], float]


def _change(before: float, after: float, below: _Side, above: _Side, freedom: float, confidence: float) -> Change:
    difference = after - before
    if difference == 0:
        relative = 0.0
    else:
        relative = difference / abs(before) if before else math.copysign(math.inf, difference)
    if not (math.isfinite(before) and math.isfinite(after)):
        nan = math.nan
        return Change(before, after, difference, relative, nan, nan, confidence, nan)
    near = below if difference > 0 else above
    deviate = _deviate(near.reach, abs(difference) - near.bound)
    p = 2 * _tail(deviate, freedom)
    known = below.reach(1.0) == above.reach(1.0) == 0
    z = 0.0 if known else _quantile(confidence, freedom)
    low, high = difference - below.bound - below.reach(z), difference + above.bound + above.reach(z)
    return Change(before, after, difference, relative, low, high, 1.0 if known else confidence, min(p, 1.0))


def _side(estimate: Estimate, *, up: bool) -> _Side:
    """One side of an estimate's interval."""
    side, other = estimate.high - estimate.value, estimate.value - estimate.low
    if not up:
        side, other = other, side
    if not math.isfinite(side):
        return _Side(0.0, lambda z: math.inf)
    side = max(side, 0.0)
    if not 0 < estimate.confidence < 1:
        return _Side(side, lambda z: 0.0)
    level = _quantile(estimate.confidence, math.inf)
    ratio = side / other if other > 0 else math.inf
    growth = math.log(min(max(ratio, 1 / LOPSIDED), LOPSIDED))

    def reach(z: float) -> float:
        if abs(growth) < STRAIGHT:
            return side * z / level
        return side * math.expm1(min(growth * z / level, MOST_EXPONENT)) / math.expm1(growth)

    return _Side(0.0, reach)


def _together(one: _Side, other: _Side) -> _Side:
    return _Side(one.bound + other.bound, lambda z: math.hypot(one.reach(z), other.reach(z)))


def _deviate(reach: Callable[[float], float], distance: float) -> float:
    """At which chance reaches so far; infinite where it never does."""
    if distance <= 0 or math.isinf(reach(1.0)):
        return 0.0
    high = 1.0
    while reach(high) < distance:
        if high > MOST_DEVIATE:
            return math.inf
        high *= 2
    return float(brentq(lambda z: reach(z) - distance, 0.0, high, xtol=1e-300, rtol=1e-14))


def _tail(distance: float, freedom: float) -> float:
    return float(ndtr(-distance) if math.isinf(freedom) else stdtr(freedom, -distance))


def _quantile(confidence: float, freedom: float) -> float:
    share = (1 + confidence) / 2
    return float(ndtri(share) if math.isinf(freedom) else stdtrit(freedom, share))
