"""Tiles from a captured problem on one device: the graph sweep.

For a tile, in blocks of the source plan's stack: for every batch and microbatch, seeds, one forward pass, one reverse wave
per part; blocks add up in buffers over microbatches and batches in a fixed order, so the same tile has the same bits
whoever computes it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from disthess.graph.ir import Graph
from disthess.graph.readers import table_lookups, table_readers
from disthess.graph.waves import leading_to, source_leaves
from disthess.planning.source import OwnColumns, SourcePlan, own_columns
from disthess.rules.base import Units
from disthess.store.layout import Layout, PanelSpec
from disthess.sweep.abstract import AbstractEngine
from disthess.sweep.activation import ActivationSink, Place, activation_targets, unit_activations
from disthess.sweep.buffers import AbstractWindow, Buffers, Window
from disthess.sweep.frame import Frame
from disthess.sweep.outputs import Wanted, add_bends, shortcut_of, sweep_back, sweep_outputs
from disthess.sweep.panel import ParameterSink
from disthess.sweep.primal import Primal
from disthess.sweep.rows import Targets
from disthess.sweep.shortcut import NONE, Shortcut
from disthess.sweep.wave import forward, reverse
from disthess.types import Part, Span

Windows = Mapping[Part, AbstractWindow]


@final
class GraphEngine(AbstractEngine):
    """Computes tiles by sweeping the graph.

    Args:
        primals: One per batch.
        parameters: Values by first name.
        layout: The store's layout.
        sources: How each source is swept, by name.
    """

    def __init__(
        self,
        primals: Sequence[Primal],
        parameters: Mapping[str, Tensor],
        layout: Layout,
        sources: Mapping[str, SourcePlan],
    ) -> None:
        self._primals = tuple(primals)
        self._parameters = parameters
        self._layout = layout
        self._sources = sources
        self._frames: dict[tuple[int, int, int], Frame] = {}
        self._ways: dict[tuple[int, str], tuple[int, ...]] = {}
        self._shortcuts: dict[tuple[int, str], Shortcut] = {}
        self._readers: dict[tuple[int, str], tuple[tuple[int, ...], ...]] = {}

    @override
    def compute(self, source: str, span: Span, split: int = 0) -> dict[Part, list[np.ndarray]]:
        plan = self._sources[source].halved(split)
        panels = self._layout.panels_of(source)
        units = Span(span.start // plan.unit_rows, -(-span.stop // plan.unit_rows))
        like = next(iter(self._parameters.values()))
        own = own_columns(plan, panels, span.start)
        buffers = {part: Buffers(units.size * plan.unit_rows, like) for part in self._layout.parts}
        with torch.no_grad():
            for block in plan.blocks(units):
                first = (block.start - units.start) * plan.unit_rows
                windows = {part: Window(held, first, block.size * plan.unit_rows) for part, held in buffers.items()}
                if plan.basis == "activation":
                    self._activation_block(plan, panels, block, windows)
                else:
                    self._block(plan, panels, own, block, windows)
            if plan.basis == "output":
                self._back(plan, panels, own, units, buffers)
        for held in buffers.values():
            held.unfold()
        drop = span.start - units.start * plan.unit_rows
        members = {panel: _members(panel, panels, self._primals[0].graph) for panel in panels}
        left = {panel: max(0, own.first * plan.unit_rows - panel.first_column(span.start)) for panel in panels}
        return {
            part: [
                buffers[part].assemble(panel, span, drop, members[panel], self._layout.decay(panel, part), left[panel])
                for panel in panels
            ]
            for part in self._layout.parts
        }

    def _block(
        self, plan: SourcePlan, panels: Sequence[PanelSpec], own: OwnColumns, block: Span, windows: Windows
    ) -> None:
        for number, primal in enumerate(self._primals):
            leaves = source_leaves(primal.graph, plan.source, plan.parameter)
            if not leaves:
                continue
            wanted = self._wanted(number, plan, panels, own)
            for frame in self._frames_of(number, plan, leaves, block):
                if plan.basis == "parameter":
                    self._parameter_block(frame, plan, leaves, wanted, block, windows)
                    continue
                for leaf in leaves:
                    sweep_outputs(frame, leaf, wanted, block, windows)

    def _back(
        self,
        plan: SourcePlan,
        panels: Sequence[PanelSpec],
        own: OwnColumns,
        units: Span,
        buffers: Mapping[Part, AbstractWindow],
    ) -> None:
        """What weights give back to inputs that targets move; once for all units of a tile."""
        for number, primal in enumerate(self._primals):
            wanted = self._wanted(number, plan, panels, own)
            for leaf in source_leaves(primal.graph, plan.source, plan.parameter):
                for frame in self._microbatches(number, plan):
                    sweep_back(frame, leaf, wanted, units, plan.stack, buffers)
                    add_bends(frame, leaf, wanted, units, plan.stack, buffers)

    def _wanted(self, number: int, plan: SourcePlan, panels: Sequence[PanelSpec], own: OwnColumns) -> Wanted:
        targets = dataclasses.replace(_targets(self._primals[number].graph, panels), own_key=plan.parameter, own=own)
        passed = self._passed(number, plan.source, targets.keys)
        return Wanted(targets, passed, self._shortcut(number, plan, passed))

    def _shortcut(self, number: int, plan: SourcePlan, passed: Sequence[int]) -> Shortcut:
        key, primal = (number, plan.source), self._primals[number]
        if plan.basis != "output":
            return NONE
        if key not in self._shortcuts:
            leaves = source_leaves(primal.graph, plan.source, plan.parameter)
            self._shortcuts[key] = shortcut_of(next(self._microbatches(number, plan)), leaves, passed)
        return self._shortcuts[key]

    def _activation_block(self, plan: SourcePlan, panels: Sequence[PanelSpec], block: Span, windows: Windows) -> None:
        before = 0
        for number, primal in enumerate(self._primals):
            source, targets = activation_targets(primal.graph, panels[0])
            passed = self._passed(number, plan.source, targets)
            for frame in self._microbatches(number, plan):
                tangents = forward(frame, {source: unit_activations(frame, source, block)})
                for part, window in windows.items():
                    place = Place(self._layout.activation_samples, before + frame.span.start)
                    reverse(frame, tangents, part, passed, ActivationSink(targets, window, place))
            before += primal.samples

    def _passed(self, number: int, source: str, targets: Iterable[int]) -> tuple[int, ...]:
        key = (number, source)
        if key not in self._ways:
            self._ways[key] = leading_to(self._primals[number].graph, targets)
        return self._ways[key]

    def _frames_of(self, number: int, plan: SourcePlan, leaves: Sequence[int], block: Span) -> Iterator[Frame]:
        """The microbatches that a block of units meets: of a row of a table, the samples that read it."""
        primal = self._primals[number]
        if not plan.table_width:
            yield from self._microbatches(number, plan)
            return
        rows = self._table_readers(number, plan, leaves)
        readers = rows[block.start // plan.table_width] if rows else ()
        if not rows or len(readers) == primal.samples:
            yield from self._microbatches(number, plan)
            return
        for start in range(0, len(readers), plan.samples):
            yield Frame(primal, Span(start, min(start + plan.samples, len(readers))), readers)

    def _table_readers(self, number: int, plan: SourcePlan, leaves: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """By row; empty where the parameter is no table on this batch's graph."""
        key = (number, plan.source)
        if key not in self._readers:
            primal = self._primals[number]
            rows = primal.graph.nodes[leaves[0]].shape[0]
            lookups = table_lookups(primal.graph, leaves)
            found = table_readers(primal.graph, lookups, primal.values, primal.samples, rows) if lookups else ()
            self._readers[key] = found
        return self._readers[key]

    def _microbatches(self, number: int, plan: SourcePlan) -> Iterator[Frame]:
        primal, size = self._primals[number], plan.samples
        as_planned = size == self._sources[plan.source].samples
        for start in range(0, primal.samples, size):
            key = (number, start, size)
            if not as_planned:
                # Smaller ones are for want of memory, and are not kept.
                yield Frame(primal, Span(start, min(start + size, primal.samples)))
                continue
            if key not in self._frames:
                self._frames[key] = Frame(primal, Span(start, min(start + size, primal.samples)))
            yield self._frames[key]

    def _parameter_block(
        self,
        frame: Frame,
        plan: SourcePlan,
        leaves: Sequence[int],
        wanted: Wanted,
        block: Span,
        windows: Windows,
    ) -> None:
        value = self._parameters[plan.parameter]
        ones = torch.arange(block.start, block.stop, device=value.device)
        tangents = forward(frame, dict.fromkeys(leaves, Units(tuple(value.shape), ones)))
        for part, window in windows.items():
            reverse(frame, tangents, part, wanted.passed, ParameterSink(wanted.targets, window))


def _apart(panels: Sequence[PanelSpec]) -> bool:
    """Whether uses are stored each for itself."""
    return any(panel.kind == "uses" for panel in panels)


def _targets(graph: Graph, panels: Sequence[PanelSpec]) -> Targets:
    apart = _apart(panels)
    wanted = {(panel.kind, name) for panel in panels for name, _ in panel.targets}
    keys: dict[int, str] = {}
    sizes: dict[int, int] = {}
    for node in graph.nodes:
        if node.kind == "use" and node.live and (("panels", node.op) in wanted or ("uses", node.name) in wanted):
            keys[node.index] = node.name if apart else node.op
            sizes[node.index] = int(np.prod(node.shape, dtype=np.int64))
    places = Counter(keys.values())
    return Targets(keys, sizes, frozenset(leaf for leaf, key in keys.items() if places[key] > 1))


def _members(panel: PanelSpec, panels: Sequence[PanelSpec], graph: Graph) -> dict[str, tuple[str, ...]]:
    """Buffer keys that add up to each target of a panel."""
    if not _apart(panels):
        return {name: (name,) for name, _ in panel.targets}
    if panel.kind != "panels":
        return {name: (name,) for name, _ in panel.targets}
    uses: dict[str, list[str]] = {}
    for node in graph.nodes:
        if node.kind == "use" and node.live:
            uses.setdefault(node.op, []).append(node.name)
    return {name: tuple(uses.get(name, ())) for name, _ in panel.targets}
