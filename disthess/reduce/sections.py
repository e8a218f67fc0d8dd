"""Sections: named ranges of a parameter that are blocks of their own, such as q, k and v in one projection matrix.

A section is written ``parameter[rows]`` or ``parameter[rows, columns, ...]``, each range ``start:stop``, ``start:``, ``:stop``,
``:`` or one number, counted as Python does.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import dask.array as da
import numpy as np
from typing_extensions import override

from disthess.errors import ConfigError, UnknownNameError
from disthess.reduce.arrays import PanelReader, lazy_block
from disthess.reduce.pairs import AbstractBlockSource
from disthess.store.layout import ParameterSpec
from disthess.store.store import Store
from disthess.types import Part

_FORM = re.compile(r"^(?P<name>.+)\[(?P<ranges>[^\[\]]*)\]$")


@dataclass(frozen=True, slots=True)
class Section:
    """A parameter, or ranges of its axes.

    Attributes:
        parameter: The parameter.
        ranges: (start, stop) of each axis.
    """

    parameter: ParameterSpec
    ranges: tuple[tuple[int, int], ...]

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole parameter."""
        return self.numel == self.parameter.numel

    @property
    def numel(self) -> int:
        """Number of entries."""
        return int(np.prod([stop - start for start, stop in self.ranges], dtype=np.int64))

    def indices(self) -> slice | np.ndarray:
        """Places of its entries in the flattened parameter, row-major; a slice where they lie together."""
        grid = np.arange(self.parameter.numel).reshape(self.parameter.shape)
        places = grid[tuple(slice(start, stop) for start, stop in self.ranges)].reshape(-1)
        if places.size and places[-1] - places[0] + 1 == places.size:
            return slice(int(places[0]), int(places[-1]) + 1)
        return places


@final
class Sections:
    """Finds parameters and sections by name.

    Args:
        parameters: Of the store.
        named: Section text by name.
    """

    def __init__(self, parameters: Sequence[ParameterSpec], named: Mapping[str, str]) -> None:
        self._parameters = {name: p for p in parameters for name in (*p.aliases, p.name)}
        self._named = dict(named)

    def find(self, name: str) -> Section:
        """A parameter, a named section, or a section written out.

        Raises:
            UnknownNameError: There is no such name; near ones are offered.
            ConfigError: Ranges are no ranges, or outside the parameter's shape.
        """
        text = self._named.get(name, name)
        if text in self._parameters:
            parameter = self._parameters[text]
            return Section(parameter, tuple((0, size) for size in parameter.shape))
        form = _FORM.match(text)
        if form is None or form["name"] not in self._parameters:
            known = [*self._named, *self._parameters]
            near = difflib.get_close_matches(form["name"] if form else text, known, n=3, cutoff=0.4) or known[:5]
            raise UnknownNameError(
                f"the store has no parameter {name!r} and no section of that name; near names: {', '.join(near)}."
            )
        parameter = self._parameters[form["name"]]
        return Section(parameter, _ranges(text, form["ranges"], parameter.shape))


@final
class SectionBlocks(AbstractBlockSource):
    """The blocks of a store's parameters, those that have named sections cut into these.

    Args:
        store: The store.
        named: Section text by name.
    """

    def __init__(self, store: Store, named: Mapping[str, str]) -> None:
        self._store = store
        finder = Sections(store.layout.parameters, named)
        cut = {name: finder.find(name) for name in named}
        self._sections: dict[str, Section] = {}
        for parameter in store.layout.parameters:
            own = {name: section for name, section in cut.items() if section.parameter.name == parameter.name}
            self._sections.update(own or {parameter.name: finder.find(parameter.name)})
        self._readers: dict[Part, PanelReader] = {}

    @property
    @override
    def sizes(self) -> Mapping[str, int]:
        return {name: section.numel for name, section in self._sections.items()}

    @property
    @override
    def has_gap(self) -> bool:
        return len(self._store.layout.parts) > 1

    @override
    def block(self, a: str, b: str, part: Part) -> np.ndarray:
        if part not in self._readers:
            self._readers[part] = PanelReader(self._store, part)
        found = section_block(self._readers[part], self._sections[a], self._sections[b])
        return np.asarray(found.compute(scheduler="threads"))


def section_block(reader: PanelReader, a: Section, b: Section) -> da.Array:
    """``[a.numel, b.numel]`` as a Dask array; only the tiles it touches are read."""
    return lazy_block(reader, a.parameter, b.parameter)[a.indices()][:, b.indices()]


def check_sections(parameters: Sequence[ParameterSpec], named: Mapping[str, str]) -> None:
    """Refuse names that hide a parameter, and sections that are none.

    Raises:
        ConfigError: With what is wrong.
    """
    taken = {name for p in parameters for name in (*p.aliases, p.name)}
    finder = Sections(parameters, {})
    for name, text in named.items():
        if name in taken:
            raise ConfigError(f"the section {name!r} has the name of a parameter; give it another.")
        try:
            finder.find(text)
        except UnknownNameError as error:
            raise ConfigError(f"section {name!r} is {text!r}: {error}") from error


def _ranges(text: str, given: str, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    pieces = [piece.strip() for piece in given.split(",")]
    if len(pieces) > len(shape):
        raise ConfigError(
            f"section {text!r} has {len(pieces)} ranges and the parameter {len(shape)} axes, {list(shape)}."
        )
    found = []
    for piece, size in zip(pieces, shape, strict=False):
        try:
            if ":" in piece:
                left, right = piece.split(":")
                ends = (int(left) if left.strip() else None, int(right) if right.strip() else None)
            else:
                ends = (int(piece), int(piece) + 1 or None)
        except ValueError as error:
            raise ConfigError(
                f"section {text!r}: {piece!r} is no range. Write start:stop, for example [0:64] or [:, 0:64]."
            ) from error
        inside = all(end is None or -size <= end <= size for end in ends)
        begin, end, _ = slice(*ends).indices(size)
        if not inside or end <= begin:
            raise ConfigError(f"section {text!r}: {piece!r} is empty or outside an axis of size {size}.")
        found.append((begin, end))
    found.extend((0, size) for size in shape[len(pieces) :])
    return tuple(found)
