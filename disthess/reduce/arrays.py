"""Blocks of the Hessian out of a store's upper panels, as numpy or Dask arrays in the user's order.

A pair is stored once, in the panel of its earlier parameter, and a diagonal block's upper triangle once; whatever is read is
therefore exactly symmetric. Parameters that the objective does not reach have no panel: their blocks are zero.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import dask
import dask.array as da
import numpy as np

from disthess.errors import StoreError, UnknownNameError
from disthess.store.layout import Layout, PanelKind, PanelSpec, ParameterSpec
from disthess.store.store import Store
from disthess.types import Part, Span


@dataclass(frozen=True, slots=True)
class Band:
    """Rows ``rows`` of a panel, from the diagonal on: columns ``[rows.start, panel.columns)``."""

    panel: PanelSpec
    rows: Span


@final
class PanelReader:
    """Reads panels of a store by parameter names.

    Args:
        store: The store; which of its tiles are done is asked once, here.
        part: Which part; ``residual`` is formed where only hessian and ggn are stored.

    Raises:
        StoreError: The store does not hold that part.
    """

    def __init__(self, store: Store, part: Part) -> None:
        self.store = store
        self.part = part
        layout = store.layout
        self._panels = {panel.source: panel for panel in layout.panels if panel.kind == "panels"}
        self.parameters = {parameter.name: parameter for parameter in layout.parameters}
        self._aliases = {alias: p.name for p in layout.parameters for alias in p.aliases}
        differs = part == "residual" and part not in layout.parts and {"hessian", "ggn"} <= set(layout.parts)
        if part not in layout.parts and not differs:
            raise StoreError(
                f"the store {store.path} holds {', '.join(layout.parts)}, not {part!r}. Compute it with parts=[..., {part!r}]."
            )
        self._differs = differs
        self._done = store.done()
        self._reduced = store.is_reduced()
        self._tiles = _tiles_by_panel(layout)

    def resolve(self, name: str) -> ParameterSpec:
        """A parameter by any of its names.

        Raises:
            UnknownNameError: There is none; near names are offered.
        """
        found = self.parameters.get(self._aliases.get(name, name))
        if found is None:
            names = [*self.parameters, *self._aliases]
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[:5]
            raise UnknownNameError(f"the store has no parameter {name!r}; near names: {', '.join(near)}.")
        return found

    def panels(self) -> tuple[PanelSpec, ...]:
        """Panels of parameters."""
        return tuple(self._panels.values())

    def ordered(self, a: ParameterSpec, b: ParameterSpec) -> tuple[PanelSpec, str] | None:
        """Panel and target that hold a pair of ``a`` no later than ``b``; None where the block is zero."""
        if not a.uses or not b.uses:
            return None
        return self._panels[a.name], b.name

    def read(self, panel: PanelSpec, rows: Span, columns: Span) -> np.ndarray:
        """A stored region.

        Raises:
            StoreError: It is missing or damaged.
        """
        if self._differs:
            return self.store.read(panel, "hessian", rows, columns) - self.store.read(panel, "ggn", rows, columns)
        return self.store.read(panel, self.part, rows, columns)

    def square(self, panel: PanelSpec, rows: Span) -> np.ndarray:
        """The diagonal square of a band, from its upper triangle."""
        return _mirrored(self.read(panel, rows, rows))

    def band(self, band: Band) -> np.ndarray:
        """A whole band, ``[rows, columns from the diagonal on]``, its diagonal square from its upper triangle."""
        values = self.read(band.panel, band.rows, Span(band.rows.start, band.panel.columns))
        values[:, : band.rows.size] = _mirrored(values[:, : band.rows.size])
        return values

    def positions(self) -> dict[str, np.ndarray]:
        """For each panel, by its source, the position of each of its columns in user order."""
        starts = np.cumsum([0, *(parameter.numel for parameter in self.parameters.values())]).tolist()
        offsets = dict(zip(self.parameters, starts[:-1], strict=True))
        return {
            source: np.concatenate([np.arange(size) + offsets[name] for name, size in panel.targets])
            for source, panel in self._panels.items()
        }

    def unreached(self, parameter: ParameterSpec) -> float:
        """What stands on the diagonal of a parameter that the objective does not reach: its weight decay; else 0."""
        return 0.0 if parameter.uses or self.part == "residual" else parameter.weight_decay

    def unreached_diagonal(self) -> np.ndarray:
        """The same for every entry, ``[P]`` in user order."""
        return np.concatenate([np.full(p.numel, self.unreached(p)) for p in self.parameters.values()])

    @property
    def read_parts(self) -> tuple[Part, ...]:
        """The stored parts that make this one: itself, or hessian and what is subtracted from it."""
        return ("hessian", "ggn") if self._differs else (self.part,)

    def require(self, name: str) -> None:
        """Refuse a parameter's panel some of whose tiles are missing.

        Raises:
            StoreError: With how many are.
        """
        panel = self._panels.get(name)
        if panel is None:
            return
        wanted = self._tiles.get((panel.kind, panel.index), [])
        absent = sum(not self._done[index] for index in wanted)
        if absent:
            raise StoreError(
                f"{absent} of {len(wanted)} tiles of the panel of {name} are missing in {self.store.path} "
                f"({int((~self._done).sum())} of {len(self._done)} in all). Run the same again to resume."
            )
        if panel.reduced and not self._reduced:
            raise StoreError(
                f"the uses of {name} in {self.store.path} are not summed yet, because the run was not finished. Run the same again."
            )

    def is_whole(self, name: str) -> bool:
        """Whether all of a parameter's panel is there."""
        try:
            self.require(name)
        except StoreError:
            return False
        return True

    def bands(self) -> Iterator[Band]:
        """All bands, in the order of panels; together they cover each stored pair once."""
        for panel in self._panels.values():
            self.require(panel.source)
            for start in range(0, panel.rows, panel.row_chunk):
                yield Band(panel, Span(start, min(start + panel.row_chunk, panel.rows)))


def block(reader: PanelReader, a: ParameterSpec, b: ParameterSpec) -> np.ndarray:
    """``[a.numel, b.numel]`` of any two parameters."""
    return np.asarray(lazy_block(reader, a, b).compute(scheduler="threads"))


def lazy_block(reader: PanelReader, a: ParameterSpec, b: ParameterSpec) -> da.Array:
    """The same as a Dask array, one chunk per row chunk of its panel."""
    if a.rank > b.rank:
        return lazy_block(reader, b, a).T
    place = reader.ordered(a, b)
    dtype = reader.store.layout.dtype
    if place is None and a.name == b.name and reader.unreached(a):
        return da.from_array(np.diag(np.full(a.numel, reader.unreached(a), dtype=dtype)))
    if place is None:
        return da.zeros((a.numel, b.numel), dtype=dtype, chunks=(min(a.numel, 4096), min(b.numel, 4096)))
    panel, target = place
    reader.require(panel.source)
    columns = panel.column_span(target)
    spans = [Span(start, min(start + panel.row_chunk, panel.rows)) for start in range(0, panel.rows, panel.row_chunk)]
    if a.name != b.name:
        return da.concatenate([_lazy(reader, panel, rows, columns) for rows in spans], axis=0)
    upper = {
        (i, j): _lazy(reader, panel, rows, other) if i < j else _lazy_square(reader, panel, rows)
        for i, rows in enumerate(spans)
        for j, other in enumerate(spans)
        if i <= j
    }
    return _symmetric(upper, len(spans))


def _lazy(reader: PanelReader, panel: PanelSpec, rows: Span, columns: Span) -> da.Array:
    loaded: Any = dask.delayed(reader.read, pure=False)(panel, rows, columns)
    return da.from_delayed(loaded, shape=(rows.size, columns.size), dtype=reader.store.layout.dtype)


def _lazy_square(reader: PanelReader, panel: PanelSpec, rows: Span) -> da.Array:
    loaded: Any = dask.delayed(reader.square, pure=False)(panel, rows)
    return da.from_delayed(loaded, shape=(rows.size, rows.size), dtype=reader.store.layout.dtype)


def _tiles_by_panel(layout: Layout) -> dict[tuple[PanelKind, int], list[int]]:
    by_source: dict[str, list[int]] = {}
    for tile in layout.tiles:
        by_source.setdefault(tile.source, []).append(tile.index)
    found: dict[tuple[PanelKind, int], list[int]] = {}
    for source, keys in layout.outputs:
        for key in keys:
            found.setdefault(key, []).extend(by_source.get(source, []))
    return found


def _mirrored(square: np.ndarray) -> np.ndarray:
    upper = np.triu(square)
    return upper + np.triu(square, 1).T


def lazy_matrix(reader: PanelReader) -> da.Array:
    """The whole ``[P, P]`` in user order."""
    parameters = list(reader.parameters.values())
    upper = {
        (i, j): lazy_block(reader, a, b) for i, a in enumerate(parameters) for j, b in enumerate(parameters) if i <= j
    }
    return _symmetric(upper, len(parameters))


def _symmetric(upper: dict[tuple[int, int], da.Array], size: int) -> da.Array:
    """Blocks of an upper triangle and their transposes: the same arrays, so that each is read once for both."""
    places = range(size)
    return da.block([[upper[i, j] if i <= j else upper[j, i].T for j in places] for i in places])
