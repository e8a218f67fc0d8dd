"""Activation blocks out of a store: one panel per source node, entry-major where rows are kept per sample."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import final

import numpy as np
from typing_extensions import override

from disthess.errors import StoreError, UnknownNameError
from disthess.reduce.pairs import AbstractBlockSource
from disthess.store.layout import ActivationSpec, PanelSpec
from disthess.store.store import Store
from disthess.types import Part, Span


@final
class ActivationReader:
    """Reads activation blocks by names of nodes or modules.

    Args:
        store: The store.
        part: Which part; ``residual`` is formed where only hessian and ggn are stored.

    Raises:
        StoreError: The store holds no activations, or not that part.
    """

    def __init__(self, store: Store, part: Part) -> None:
        self._store = store
        layout = store.layout
        if not layout.activations:
            raise StoreError(
                f"the store {store.path} holds no activation blocks. Compute one with activations=['module or node', ...]."
            )
        self._differs = part == "residual" and part not in layout.parts and {"hessian", "ggn"} <= set(layout.parts)
        if part not in layout.parts and not self._differs:
            raise StoreError(f"the store {store.path} holds {', '.join(layout.parts)}, not {part!r}.")
        self._part = part
        self._samples = layout.activation_samples
        self._rank = {entry.name: place for place, entry in enumerate(layout.activations)}
        self._named = {name: entry for entry in layout.activations for name in (*entry.modules, entry.name)}
        self._panels = {panel.source: panel for panel in layout.panels if panel.kind == "activations"}

    def resolve(self, name: str) -> ActivationSpec:
        """An activation by the name of its node or module.

        Raises:
            UnknownNameError: There is none; near names are offered.
        """
        if name not in self._named:
            near = difflib.get_close_matches(name, list(self._named), n=3, cutoff=0.4) or list(self._named)[:5]
            raise UnknownNameError(f"the store has no activation {name!r}; near names: {', '.join(near)}.")
        return self._named[name]

    def block(self, v: ActivationSpec, w: ActivationSpec, per_sample: bool) -> np.ndarray:
        """``[d_v, d_w]`` summed over samples, or ``[n, d_v, d_w]``.

        Raises:
            StoreError: Per-sample blocks were not kept, or tiles are missing.
        """
        if per_sample and not self._samples:
            raise StoreError(
                f"the store {self._store.path} holds activation blocks summed over samples. Compute it with "
                "activations_per_sample=True."
            )
        if self._rank[v.name] > self._rank[w.name]:
            return np.swapaxes(self.block(w, v, per_sample), -1, -2)
        panel = self._panels[v.name]
        values = self._read(panel, Span(0, panel.rows), panel.column_span(w.name))
        if not self._samples:
            return values
        apart = values.reshape(v.numel, self._samples, w.numel)
        return np.ascontiguousarray(apart.swapaxes(0, 1)) if per_sample else apart.sum(axis=1)

    def _read(self, panel: PanelSpec, rows: Span, columns: Span) -> np.ndarray:
        if self._differs:
            return self._store.read(panel, "hessian", rows, columns) - self._store.read(panel, "ggn", rows, columns)
        return self._store.read(panel, self._part, rows, columns)


@final
class ActivationBlocks(AbstractBlockSource):
    """The activation blocks of a store, as a source of pairs."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._readers: dict[Part, ActivationReader] = {}
        ActivationReader(store, store.layout.parts[0])

    @property
    @override
    def sizes(self) -> Mapping[str, int]:
        return {entry.name: entry.numel for entry in self._store.layout.activations}

    @property
    @override
    def has_gap(self) -> bool:
        return len(self._store.layout.parts) > 1

    @override
    def block(self, a: str, b: str, part: Part) -> np.ndarray:
        if part not in self._readers:
            self._readers[part] = ActivationReader(self._store, part)
        reader = self._readers[part]
        return reader.block(reader.resolve(a), reader.resolve(b), per_sample=False)
