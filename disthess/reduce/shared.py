"""Sums over uses: the panel of a shared parameter from the panels of its uses.

    H[theta, phi] = sum over uses a of theta and b of phi of H_ab,   H_ab = H_ba^T

A pair of uses is stored in the panel of whichever comes first. Sums are Dask's, one row chunk at a time, in a fixed order, so
that the result has the same bytes every time.
"""

from __future__ import annotations

import functools
import operator
from typing import Any, final

import dask
import dask.array as da
import numpy as np

from disthess.reduce.scheduler import scheduler_of
from disthess.reduce.uses import UseReader
from disthess.store.layout import PanelSpec, ParameterSpec
from disthess.store.store import Store
from disthess.store.verify import Damage, summed_rows
from disthess.types import Part, Span


def reduce_shared(store: Store, client: Any = None) -> None:
    """Write every panel that is a sum over uses.

    Args:
        store: With all tiles done, open for writing.
        client: A ``dask.distributed`` Client whose workers read and sum; None for threads of this process. Same bytes.

    Raises:
        StoreError: A tile is missing, or the disk is full.
    """
    sums = _Sums(store, client)
    for panel, part, rows in summed_rows(store):
        store.write_rows(panel, part, rows.start, sums.rows(panel, part, rows))


def wrong_sums(store: Store) -> list[Damage]:
    """Rows of summed panels that are not the sum of their uses, to the byte.

    Args:
        store: With all tiles done and whole, and its sums written.
    """
    sums, found = _Sums(store, None), []
    for panel, part, rows in summed_rows(store):
        stored = store.read(panel, part, rows, Span(panel.first_column(rows.start), panel.columns))
        if stored.tobytes() != sums.rows(panel, part, rows).tobytes():
            place = f"sums of {panel.source}, rows {rows.start} to {rows.stop - 1}, {part}"
            found.append(Damage(-1, place, "they are not the sum of their uses", "sum", panel.path(part)))
    return found


@final
class _Sums:
    def __init__(self, store: Store, client: Any) -> None:
        self._store = store
        self._client = client
        self._uses = UseReader(store)
        self._parameters = {parameter.name: parameter for parameter in store.layout.parameters}

    def rows(self, panel: PanelSpec, part: Part, rows: Span) -> np.ndarray:
        """Rows of a summed panel from its first stored column on."""
        first = panel.first_column(rows.start)
        source = self._parameters[panel.source]
        pieces = []
        for name, size in panel.targets:
            skip = first if name == panel.source else 0
            if skip < size:
                pieces.append(self._target(source, self._parameters[name], part, rows, skip))
        summed = np.array(da.concatenate(pieces, axis=1).compute(scheduler=scheduler_of(self._client)), order="C")
        places = np.arange(rows.size)
        summed[places, places + rows.start - first] += self._store.layout.decay(panel, part)
        return summed

    def _target(self, source: ParameterSpec, target: ParameterSpec, part: Part, rows: Span, skip: int) -> da.Array:
        columns = Span(skip, target.numel)
        terms = [self._lazy(a, b, part, rows, columns) for a in source.uses for b in target.uses]
        return functools.reduce(operator.add, terms)

    def _lazy(self, a: str, b: str, part: Part, rows: Span, columns: Span) -> da.Array:
        loaded: Any = dask.delayed(self._uses.pair, pure=False)(a, b, part, rows, columns)
        return da.from_delayed(loaded, shape=(rows.size, columns.size), dtype=self._store.layout.dtype)
