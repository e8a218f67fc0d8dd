"""Blocks of single uses: which occurrence of a shared parameter a part of its curvature belongs to.

    H_ab = d2 L / d theta_a d theta_b,   theta_a the values that use a reads, as if every use had a copy of its own

A pair of uses is stored in the panel of whichever comes first; a pair of which neither is shared is its parameters' block.
"""

from __future__ import annotations

import difflib
from typing import final

import numpy as np

from disthess.errors import StoreError, UnknownNameError
from disthess.reduce.arrays import PanelReader, block
from disthess.store.layout import PanelSpec, ParameterSpec
from disthess.store.store import Store
from disthess.types import Part, Span


@final
class UseReader:
    """Reads the blocks of pairs of uses.

    Args:
        store: The store.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._panels = {panel.source: panel for panel in store.layout.panels if panel.kind == "uses"}
        self._owners = {use: parameter for parameter in store.layout.parameters for use in parameter.uses}

    def block(self, a: str, b: str, part: Part) -> np.ndarray:
        """``H_ab``, ``[numel of a, numel of b]``.

        Raises:
            UnknownNameError: No such use; near names are offered.
            StoreError: The store has only sums over uses, or not that part, or tiles are missing.
        """
        first, second = self._owner(a), self._owner(b)
        if len(first.uses) == 1 and len(second.uses) == 1:
            return block(PanelReader(self._store, part), first, second)
        if not self._panels:
            shared = first if len(first.uses) > 1 else second
            raise StoreError(
                f"the store {self._store.path} holds {shared.name} summed over its {len(shared.uses)} uses, not each use apart. "
                "Compute it again with shared='uses'."
            )
        whole = Span(0, first.numel), Span(0, second.numel)
        if part == "residual" and part not in self._store.layout.parts:
            return self.pair(a, b, "hessian", *whole) - self.pair(a, b, "ggn", *whole)
        return self.pair(a, b, part, *whole)

    def _owner(self, use: str) -> ParameterSpec:
        if use not in self._owners:
            near = difflib.get_close_matches(use, list(self._owners), n=4, cutoff=0.3) or list(self._owners)[:5]
            raise UnknownNameError(
                f"the store has no use {use!r}; uses are parameter@node, near ones: {', '.join(near)}."
            )
        return self._owners[use]

    def pair(self, a: str, b: str, part: Part, rows: Span, columns: Span) -> np.ndarray:
        """``H_ab[rows, columns]`` of a stored part, from the panels of uses."""
        if a == b:
            return self._own(self._panels[a], part, rows, columns)
        if a in self._panels and b in dict(self._panels[a].targets):
            return self._region(self._panels[a], b, part, rows, columns)
        return self._region(self._panels[b], a, part, columns, rows).T

    def _region(self, panel: PanelSpec, target: str, part: Part, rows: Span, columns: Span) -> np.ndarray:
        offset = panel.column_span(target).start
        return self._store.read(panel, part, rows, Span(offset + columns.start, offset + columns.stop))

    def _own(self, panel: PanelSpec, part: Part, rows: Span, columns: Span) -> np.ndarray:
        """A use's own square from its upper triangle; columns run from at most ``rows.start`` to the end.

        The summed panel's row chunks need not be the use's: rows are read chunk by chunk of the use, each from its own
        first row on, because what lies left of that is not always stored.
        """
        upper = np.zeros((rows.size, columns.stop - rows.start), dtype=self._store.layout.dtype)
        start = rows.start
        while start < rows.stop:
            stop = min(rows.stop, (start // panel.row_chunk + 1) * panel.row_chunk)
            piece = self._store.read(panel, part, Span(start, stop), Span(start, columns.stop))
            upper[start - rows.start : stop - rows.start, start - rows.start :] = piece
            start = stop
        square = np.triu(upper[:, : rows.size])
        upper[:, : rows.size] = square + np.triu(square, 1).T
        if columns.start == rows.start:
            return upper
        before = self._store.read(panel, part, Span(columns.start, rows.start), rows)
        return np.concatenate([before.T, upper], axis=1)
