"""Which entries of all parameters are meant: a range of the whole, a parameter, or a section of one."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from disthess.errors import ConfigError
from disthess.reduce.arrays import PanelReader, lazy_block
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
        asked: A slice, range or number in ``range(P)``; the text of a parameter or of ranges of one; or such a text and a slice of
            its entries, ``("encoder.weight", slice(0, 1024))``.
        named: Sections by name.

    Raises:
        UnknownNameError: No such parameter; near names are offered.
        ConfigError: It is none of these, or empty, or outside.
    """
    numel = sum(parameter.numel for parameter in parameters)
    if isinstance(asked, tuple):
        if len(asked) != 2 or not isinstance(asked[0], str):
            raise ConfigError(f"{asked!r} says no rows or columns; a pair is a name and a slice of its entries.")
        whole = find_places(parameters, asked[0], named)
        span = _range(asked[1], whole.count, asked[0])
        text = f"{asked[0]}, entries {span.start}:{span.stop}"
        if whole.indices is None:
            return Places(text, whole.start + span.start, span.size)
        return Places(text, whole.start, span.size, whole.indices[span.start : span.stop])
    if isinstance(asked, str):
        section = Sections(parameters, named or {}).find(asked)
        first = next(i for i, parameter in enumerate(parameters) if parameter.name == section.parameter.name)
        start = sum(parameter.numel for parameter in parameters[:first])
        within = section.indices()
        if isinstance(within, slice):
            return Places(asked, start + within.start, within.stop - within.start)
        return Places(asked, start, len(within), within)
    span = _range(asked, numel, "all parameters")
    return Places(f"{span.start}:{span.stop}", span.start, span.size)


@dataclass(frozen=True, slots=True)
class ParameterPlaces:
    """Entries of one parameter, in increasing order.

    Attributes:
        parameter: Which.
        indices: Where they are in it.
    """

    parameter: ParameterSpec
    indices: np.ndarray


def places_by_parameter(
    parameters: Sequence[ParameterSpec], asked: Any, named: dict[str, str]
) -> tuple[ParameterPlaces, ...]:
    """As `find_places`, parameter by parameter."""
    places, start, found = find_places(parameters, asked, named), 0, []
    for parameter in parameters:
        _, indices = places.inside(Span(start, start + parameter.numel))
        start += parameter.numel
        if indices.size:
            found.append(ParameterPlaces(parameter, indices))
    return tuple(found)


def read_places(reader: PanelReader, rows: ParameterPlaces, columns: ParameterPlaces) -> np.ndarray:
    """Entries of a store, ``[rows, columns]``; of the block no more is read than lies between the first and the last."""
    tops, lefts = rows.indices, columns.indices
    found = lazy_block(reader, rows.parameter, columns.parameter)
    within = found[tops[0] : tops[-1] + 1, lefts[0] : lefts[-1] + 1].compute(scheduler="threads")
    return np.asarray(within)[np.ix_(tops - tops[0], lefts - lefts[0])]


def _range(asked: Any, numel: int, of: str) -> Span:
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
            f"{asked!r} says no rows or columns. Give a slice or range of the {numel:,} entries of {of}, or the name of a "
            f"parameter or section."
        ) from error
    inside = all(end is None or -numel <= end <= numel for end in ends)
    begin, stop, _ = slice(*ends).indices(numel)
    if not inside or stop <= begin:
        raise ConfigError(f"{asked!r} is empty or outside the {numel:,} entries of {of}.")
    return Span(begin, stop)
