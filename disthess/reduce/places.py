"""Which entries of all parameters are meant: a range of the whole, a parameter, or a section of one."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from disthess.errors import ConfigError
from disthess.reduce.sections import Sections
from disthess.store.layout import ParameterSpec
from disthess.types import Span


@dataclass(frozen=True, slots=True)
class Places:
    """Entries in ``range(P)``, in increasing order.

    Attributes:
        text: As it was asked for, for people.
        start: First entry of the range that they lie in.
        count: How many.
        indices: Where they are counted from ``start``; None where they are a range.
    """

    text: str
    start: int
    count: int
    indices: np.ndarray | None = None

    def chunks(self, size: int) -> tuple[int, ...]:
        """Numbers of the chunks of ``size`` entries that they meet.

        >>> Places("w", 3, 4).chunks(4)
        (0, 1)
        """
        if self.indices is None:
            return tuple(range(self.start // size, -(-(self.start + self.count) // size)))
        return tuple(np.unique((self.indices + self.start) // size).tolist())

    def inside(self, span: Span) -> tuple[np.ndarray, np.ndarray]:
        """Those inside a span: their positions among all of these, and their positions in the span."""
        if self.indices is None:
            found = np.arange(max(span.start, self.start), min(span.stop, self.start + self.count))
            return found - self.start, found - span.start
        low, high = np.searchsorted(self.indices, [span.start - self.start, span.stop - self.start])
        return np.arange(low, high), self.indices[low:high] + self.start - span.start


def find_places(parameters: Sequence[ParameterSpec], asked: Any, named: dict[str, str] | None = None) -> Places:
    """The entries that somebody asks for.

    Args:
        parameters: In user order.
        asked: A slice, range or number in ``range(P)``, or the text of a parameter or of ranges of one.
        named: Sections by name.

    Raises:
        UnknownNameError: No such parameter; near names are offered.
        ConfigError: It is none of these, or empty, or outside.
    """
    numel = sum(parameter.numel for parameter in parameters)
    if isinstance(asked, str):
        section = Sections(parameters, named or {}).find(asked)
        first = next(i for i, parameter in enumerate(parameters) if parameter.name == section.parameter.name)
        start = sum(parameter.numel for parameter in parameters[:first])
        within = section.indices()
        if isinstance(within, slice):
            return Places(asked, start + within.start, within.stop - within.start)
        return Places(asked, start, len(within), within)
    span = _range(asked, numel)
    return Places(f"{span.start}:{span.stop}", span.start, span.size)


def _range(asked: Any, numel: int) -> Span:
    try:
        if isinstance(asked, (slice, range)):
            if asked.step not in (None, 1):
                raise ConfigError(f"{asked!r} has steps; ask for a range without them.")
            ends = [None if end is None else operator.index(end) for end in (asked.start, asked.stop)]
        else:
            number = operator.index(asked)
            ends = [number, number + 1 or None]
    except TypeError as error:
        raise ConfigError(
            f"{asked!r} says no rows or columns. Give a slice or range of the {numel:,} parameters, or the name of a parameter or "
            f"section."
        ) from error
    inside = all(end is None or -numel <= end <= numel for end in ends)
    begin, stop, _ = slice(*ends).indices(numel)
    if not inside or stop <= begin:
        raise ConfigError(f"{asked!r} is empty or outside the {numel:,} parameters.")
    return Span(begin, stop)
