"""How far an audit is, and how long it will still take, from the speed of the products that it has taken."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np
from typing_extensions import override

from disthess.linalg.operator import AbstractSymmetricOperator

if TYPE_CHECKING:
    from collections.abc import Iterator


GUESS = 0.4
"""That share where nothing is known."""


FEW = 2
"""Products of a kind whose own speed counts no more than that of other kinds."""


def share_needed(parts: Sequence[Part], products: int) -> float | None:
    """The share of their limit that products needed until they converged, from all products of an earlier audit.

    >>> share_needed([Part("fixed", 50), Part("ends", 100, True)], 80)
    0.3
    """
    limit = sum(part.products for part in parts if part.until_converged)
    fixed = sum(part.products for part in parts if not part.until_converged)
    return min(1.0, max(0.0, (products - fixed) / limit)) if limit else None


@dataclass(frozen=True, slots=True)
class Part:
    """Some of an audit's products.

    Attributes:
        name: What they are for.
        products: How many; at most, where they end as soon as a residual is small enough.
        until_converged: Whether they do.
    """

    name: str
    products: int
    until_converged: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """Where an audit is.

    Attributes:
        part: What is being computed.
        products: Taken so far, all checkpoints together.
        expected: Altogether, as known by now.
        seconds: Since the start.
        remaining_seconds: Until the end; NaN before anything was measured.
    """

    part: str
    products: int
    expected: int
    seconds: float
    remaining_seconds: float


@dataclass(frozen=True, slots=True)
class _Pace:
    products: int
    seconds: float

    @property
    def seconds_each(self) -> float:
        return self.seconds / self.products if self.products else math.nan


def _pooled(paces: Iterable[_Pace]) -> _Pace:
    found = list(paces)
    return _Pace(sum(pace.products for pace in found), sum(pace.seconds for pace in found))


def _kind(part: Part) -> str:
    """What its products are for, in whatever block."""
    return part.name.rpartition(": ")[2]


@final
class Meter:
    """Counts products and foretells the rest.

    Products that end when they converge are foretold by the line through the logarithms of their residuals; where none was seen
    yet, by the share of their limit that earlier ones of the kind needed, in this audit or, where the first is not through, in the
    history. Only where there is neither is it a guess; where an audit file sets ``steps``, no products are of that kind. Any others
    are as many as the last time, in this audit or in the history: a Krylov space may end early, and what cannot be measured takes
    none.

    Seconds are those of products of the same kind, in whatever block: Lanczos takes vectors one by one, and sets each against all
    before it. Products of a kind that has not been seen count as those of the other kinds but the present one. The first to come
    back, which have waited for the model and its libraries to warm up, do not count; until others have, nothing is foretold.

    Args:
        parts: Of one checkpoint, in their order.
        checkpoints: How many there are.
        tell: Called with each progress.
        clock: Seconds.
        guess: Share of their limit that products need until they converge, before any have here.
        before: Products of each part the last time, as the history has them.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        checkpoints: int = 1,
        tell: Callable[[Progress], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        guess: float | None = None,
        before: Mapping[str, int] | None = None,
    ) -> None:
        self._guess = GUESS if guess is None else guess
        self._is_known = guess is not None
        self._parts = tuple(parts)
        self._left = checkpoints
        self._tell = tell
        self._clock = clock
        self._start = clock()
        self._taken = 0
        self._last: float | None = None
        self._paces: dict[str, _Pace] = {}
        self._open: dict[str, Part] = {}
        self._now: Part | None = None
        self._in_part = 0
        self._target: float | None = None
        self._residuals: list[tuple[int, float]] = []
        self._needed: list[float] = []
        self._before = dict(before or {})
        self._spent: dict[str, int] = {}

    def begin_checkpoint(self) -> None:
        """A checkpoint is measured from now on."""
        self._left = max(0, self._left - 1)
        self._open = {part.name: part for part in self._parts}
        self._spent = {}

    @property
    def spent(self) -> dict[str, int]:
        """Products of this checkpoint by part, of those that are through."""
        return dict(self._spent)

    def skip(self, name: str) -> None:
        """That part cannot be measured: nothing waits for it, here and at the checkpoints to come."""
        self._open.pop(name, None)
        self._before[name] = 0

    @contextmanager
    def part(self, name: str, tolerance: float | None = None) -> Iterator[None]:
        """Products taken inside are of that part; ``tolerance`` is the residual at which they end."""
        self._now = self._open.pop(name, Part(name, 0))
        self._in_part, self._target, self._residuals = 0, tolerance, []
        # Loading before the first part comes again with every checkpoint; later gaps are of what came before.
        if self._last is not None and self._spent:
            self._last = self._clock()
        try:
            yield
            # What an error cuts short says nothing about the next time.
            self._spent[name] = self._before[name] = self._in_part
            if self._now.until_converged and self._now.products:
                self._needed.append(self._in_part / self._now.products)
        finally:
            # What follows the last product (Ritz vectors, say) is the part's as well.
            self._pass(0)
            self._now = None

    def count(self, products: int) -> None:
        """So many products have been taken."""
        self._taken += products
        self._in_part += products
        self._pass(products)
        if self._tell is not None:
            self._tell(self.progress())

    def _pass(self, products: int) -> None:
        """The time since it was last looked at has gone into so many products of the present part."""
        now = self._clock()
        if self._last is not None and self._now is not None:
            kind = _kind(self._now)
            self._paces[kind] = _pooled([self._paces.get(kind, _Pace(0, 0.0)), _Pace(products, now - self._last)])
        if self._last is not None or products:
            self._last = now

    def watch(self, products: int, residual: float) -> None:
        """A residual after so many products of the part."""
        self._residuals.append((products, residual))

    def progress(self) -> Progress:
        """Where it is now."""
        left = self._left_by_kind()
        # What is between products (orthogonalisation, tables) comes with them.
        seconds = sum(count * self._pace(kind) for kind, count in left.items() if count)
        name = self._now.name if self._now is not None else ""
        expected = self._taken + round(sum(left.values()))
        return Progress(name, self._taken, expected, self._clock() - self._start, seconds)

    def _left_by_kind(self) -> dict[str, float]:
        """Products that are to come."""
        left: dict[str, float] = {}
        if self._now is not None:
            left[_kind(self._now)] = max(self._current_total(self._now) - self._in_part, 0.0)
        for part, times in [
            *((part, 1) for part in self._open.values()),
            *((part, self._left) for part in self._parts),
        ]:
            left[_kind(part)] = left.get(_kind(part), 0.0) + times * self._expected(part)
        return left

    def _pace(self, kind: str) -> float:
        """Seconds of one product; NaN where nothing tells."""
        now = "" if self._now is None else _kind(self._now)
        rest = [pace for other, pace in self._paces.items() if other not in (kind, now) and pace.products]
        others = _pooled(rest or self._paces.values())
        own = self._paces.get(kind, _Pace(0, 0.0))
        # As if a few had taken as long as others: a kind that has just begun is not told by its first product alone.
        return (own.seconds + FEW * others.seconds_each) / (own.products + FEW)

    def _expected(self, part: Part) -> float:
        if not part.until_converged:
            return float(self._before.get(part.name, part.products))
        return part.products * (float(np.mean(self._needed)) if self._needed else self._needed_now())

    def _needed_now(self) -> float:
        """The share of its limit that the part which is being computed will need; a guess where that cannot be told."""
        now = self._now
        if now is None or not now.until_converged or not now.products:
            return self._guess
        return self._current_total(now) / now.products

    def _current_total(self, part: Part) -> float:
        """Of the part that is being computed."""
        if not part.until_converged:
            before = self._before.get(part.name, part.products)
            return float(before if self._in_part <= before else part.products)
        known = part.products * (float(np.mean(self._needed)) if self._needed else self._guess)
        if self._target is None or len(self._residuals) < 3:
            return max(known, float(self._in_part))
        # The latter half: residuals of Krylov methods fall the faster the longer they have been falling.
        recent = self._residuals[len(self._residuals) // 2 :] if len(self._residuals) > 5 else self._residuals[-3:]
        steps, logs = np.array([row[0] for row in recent], dtype=float), np.log([max(row[1], 1e-300) for row in recent])
        slope = float(np.polyfit(steps, logs, 1)[0])
        if slope >= 0:
            return max(known, float(self._in_part))
        missing = max(0.0, float(logs[-1]) - math.log(self._target)) / -slope
        found = min(float(part.products), float(steps[-1]) + missing)
        if not self._needed and not self._is_known:
            return found
        # What earlier ones needed is better than the line through few residuals, and worse than that through nearly all.
        trust = min(1.0, self._in_part / max(known, 1.0))
        return max(float(self._in_part), (1 - trust) * known + trust * found)


LARGE = 1 << 20
"""Parameters from which a product takes so long that what is left is told every few of them."""

AT_ONCE = 2
"""Products between two such times: nothing of that size is faster for more vectors at once."""


@final
class MeteredOperator(AbstractSymmetricOperator):
    """The same operator, its products counted by a meter."""

    def __init__(self, inner: AbstractSymmetricOperator, meter: Meter) -> None:
        self._inner = inner
        self._meter = meter
        self.products = 0

    @property
    @override
    def size(self) -> int:
        return self._inner.size

    @property
    @override
    def dtype(self) -> np.dtype:
        return self._inner.dtype

    @override
    def matmat(self, block: np.ndarray) -> np.ndarray:
        together = block.shape[1] if self.size <= LARGE else AT_ONCE
        if block.shape[1] <= together:
            return self._counted(block)
        found = np.empty(block.shape, dtype=self.dtype, order="F")
        for start in range(0, block.shape[1], together):
            here = slice(start, start + together)
            found[:, here] = self._counted(block[:, here])
        return found

    def _counted(self, block: np.ndarray) -> np.ndarray:
        found = self._inner.matmat(block)
        self.products += block.shape[1]
        self._meter.count(block.shape[1])
        return found
