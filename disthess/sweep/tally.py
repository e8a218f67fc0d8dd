"""The sweep, counted instead of run: the same forward pass and reverse wave over stacks that are only counted.

`forward` and `reverse` decide which nodes are passed and which terms exist; here they meet rules that return how much they would
do (`RuleMeter`) and stacks that have no entries. So a sweep and its projection cannot disagree about what is done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, final

import torch

from disthess.graph.ir import Graph, Node
from disthess.graph.waves import leading_to
from disthess.planning.work import ReverseWork, SharedWork, SweepWork, Work
from disthess.rules.base import Units
from disthess.rules.outer import outer_multiply_adds
from disthess.rules.table import rule_for
from disthess.sweep.meter import RuleMeter
from disthess.sweep.rowwise import Rowwise
from disthess.sweep.shortcut import NONE, Shortcut, shortcut_behind
from disthess.sweep.thin import contracts_first, first_multiply_adds, keeps_units
from disthess.sweep.wave import AbstractSink, forward, keeps_curvature, reverse
from disthess.types import PARTS, Part


@dataclass(frozen=True, slots=True)
class Trace:
    """Stands for a stack. ``apart``: for a value shared by all samples, K tangents for each of them."""

    apart: bool = False

    def __add__(self, other: Trace) -> Trace:
        return Trace(self.apart or other.apart)

    def flatten(self, first: int, last: int) -> Trace:
        """Tangents and samples in one axis."""
        return Trace(True)


@dataclass(slots=True)
class Tally:
    """What has been counted so far; see `ReverseWork`."""

    work: Work = field(default_factory=Work)
    repeated: list[tuple[int, int]] = field(default_factory=list)
    own: bool = False
    per_unit: int = 0
    shared: SharedWork = field(default_factory=SharedWork)


@dataclass(frozen=True, slots=True)
class OutputSource:
    """What the output basis multiplies rows by.

    Attributes:
        index: The layer's node.
        leaf: The source's leaf.
        width: Inputs of the layer.
        rows: Rows of one sample at its output.
        shared: Target leaves whose rows add up with those of other leaves.
        shortcut: Why its outputs need fewer tangents than they are.
    """

    index: int
    leaf: int
    width: int
    rows: int
    shared: frozenset[int] = frozenset()
    shortcut: Shortcut = NONE

    @property
    def start(self) -> int:
        """Where tangents start."""
        pooling = self.shortcut.pooling
        return self.index if pooling is None else pooling.start

    @property
    def apart(self) -> int:
        """Rows of a sample that are taken for samples."""
        return 1 if self.shortcut.rowwise is None else self.shortcut.rowwise.count

    @property
    def layer_rows(self) -> int:
        """Rows of what is taken for a sample."""
        return self.rows // self.apart

    @property
    def tangents(self) -> int:
        """Of a unit and sample."""
        pooling = self.shortcut.pooling
        return self.layer_rows if pooling is None else pooling.places


@final
class SweepTally:
    """Counts sweeps of one graph.

    Args:
        graph: The captured objective.
        parts: Parts to count.

    Attributes:
        parts: Those that the graph has.
    """

    def __init__(self, graph: Graph, parts: Sequence[Part] = PARTS) -> None:
        self._graph = graph
        self._meter = RuleMeter(graph)
        self.parts = tuple(part for part in parts if part == "hessian" or graph.has_model_boundary)
        self._shared = any(node.live and node.kind == "op" and node.region == "weight" for node in graph.nodes)

    def sweep(self, seeds: Sequence[int], targets: Sequence[Node], source: OutputSource | None) -> SweepWork:
        """One sweep.

        Args:
            seeds: Nodes that tangents start at.
            targets: Leaves or nodes that rows are wanted of.
            source: In the output basis, the layer; else None.
        """
        passed = leading_to(self._graph, [node.index for node in targets])
        ahead = Tally()
        tangents = forward(self._frame(ahead, True), self._seeds(seeds))
        waves = []
        for part in self.parts:
            first = self._wave(tangents, part, passed, source, True)
            later = self._wave(tangents, part, passed, source, False) if self._shared else first
            repeated, per_unit = tuple(first.repeated), first.per_unit + self._bends(source, part)
            waves.append(ReverseWork(part, first.work, later.work, repeated, first.own, per_unit, shared=first.shared))
        if source is None:
            return SweepWork(ahead.work, tuple(waves))
        if source.shortcut.pooling is not None:
            ahead.work += Work(per_pair=source.rows * source.width)
        return SweepWork(ahead.work, tuple(waves), source.tangents, source.layer_rows, source.apart)

    def _bends(self, source: OutputSource | None, part: Part) -> int:
        """What `disthess.sweep.pooled.bends` is multiplied by, per unit and sample."""
        pooling = None if source is None else source.shortcut.pooling
        if source is None or pooling is None:
            return 0
        frame = self._frame(Tally(), True)
        kept = [step for step in pooling.steps if keeps_curvature(frame, frame.node(step.node), part)]
        bent = any(self._meter.cotangent(step.node, False, (step.slot,), (step.slot,))[1] for step in kept)
        return source.rows * source.width**2 if bent else 0

    def shortcut(self, leaves: Sequence[Node], targets: Sequence[Node]) -> Shortcut:
        """Why the outputs of a source need fewer tangents than they are."""
        passed, meter = leading_to(self._graph, [node.index for node in targets]), self._meter
        return shortcut_behind(
            self._graph, [leaf.index for leaf in leaves], passed, meter.keeps_apart, meter.takes_rows_for_samples
        )

    def back(self, targets: Sequence[Node], source: OutputSource) -> SweepWork:
        """The waves from the source's inputs back to what they depend on, ``delta`` times their rows included."""
        passed, inputs = leading_to(self._graph, [node.index for node in targets]), self._source_input(source.index)
        waves = []
        for part in self.parts:
            tally = Tally()
            frame = self._frame(tally, True)
            if inputs in passed and keeps_curvature(frame, frame.node(source.index), part):
                sink = _TallySink(tally, self._graph, source, back=True)
                reverse(frame, {}, part, passed, sink, {inputs: Trace()})  # type: ignore[dict-item]
            waves.append(
                ReverseWork(part, Work(), Work(), per_unit=tally.per_unit, back=tally.work, shared=tally.shared)
            )
        return SweepWork(Work(), tuple(waves), source.tangents, source.layer_rows, source.apart)

    def source_rows(self, index: int, leaf: int) -> tuple[int, int] | None:
        """Rows of a sample and inputs of a node that a leaf enters once, as an output basis wants it; else None."""
        slots = self._graph.slots(index)
        return self._meter.source_rows(index, slots.index(leaf)) if slots.count(leaf) == 1 else None

    def _source_input(self, index: int) -> int:
        """The node that a source's weight multiplies."""
        return self._graph.slots(index)[rule_for(self._graph.nodes[index].op).source_slot]

    def _seeds(self, seeds: Sequence[int]) -> Any:
        """Unit vectors at leaves, as the parameter basis has them; elsewhere stacks."""
        nodes = [self._graph.nodes[index] for index in seeds]
        first = torch.zeros(1, dtype=torch.long)
        return {node.index: Units(node.shape, first) if node.kind == "use" else Trace() for node in nodes}

    def _wave(
        self, tangents: Mapping[int, Any], part: Part, passed: Sequence[int], source: OutputSource | None, first: bool
    ) -> Tally:
        tally = Tally()
        rowwise = None if source is None else source.shortcut.rowwise
        reverse(self._frame(tally, first, rowwise), tangents, part, passed, _TallySink(tally, self._graph, source))
        return tally

    def _frame(self, tally: Tally, first: bool, rowwise: Rowwise | None = None) -> Any:
        """What the waves ask of a frame; a call is the index of its node."""
        graph = self._graph

        return SimpleNamespace(
            primal=SimpleNamespace(graph=graph),
            first=first,
            node=graph.nodes.__getitem__,
            slots=graph.slots,
            call=lambda index: index,
            rule=lambda index: _TallyRule(tally, self._meter, rowwise),
        )


@final
class _TallyRule:
    """Stands for a rule; a call is the index of its node."""

    def __init__(self, tally: Tally, meter: RuleMeter, rowwise: Rowwise | None) -> None:
        self._tally = tally
        self._meter = meter
        self._rowwise = rowwise

    def tangent(self, call: int, tangents: Mapping[int, Trace]) -> Trace:
        self._tally.work += self._meter.tangent(call, tuple(sorted(tangents)))
        return Trace()

    def cotangent(
        self, call: int, cotangent: Trace | None, tangents: Mapping[int, Trace], wanted: tuple[int, ...]
    ) -> dict[int, Trace]:
        work, found = self._meter.cotangent(call, cotangent is not None, tuple(sorted(tangents)), wanted)
        apart = cotangent is not None and cotangent.apart
        self._tally.work += Work(work.once, 0, 0, work.per_tangent) if apart else work
        return dict.fromkeys(found, Trace(apart))

    def add_units(self, call: int, slot: int, units: Units, total: Trace | None) -> Trace:
        self._tally.work += self._meter.units(call, slot)
        return Trace()

    def add_units_back(
        self, call: int, slot: int, units: Units, wanted: tuple[int, ...], found: dict[int, Trace]
    ) -> None:
        work, moved = self._meter.units_back(call, slot, wanted)
        self._tally.work += work
        for other in moved:
            found.setdefault(other, Trace())

    def cotangent_per_sample(
        self, call: int, cotangent: Trace | None, tangents: Mapping[int, Trace], slot: int
    ) -> Trace:
        self._tally.work += self.rows(call, cotangent, tangents, slot)[0]
        return Trace()

    def thin(self, call: int, cotangent: Trace | None, tangents: Mapping[int, Trace], slot: int) -> bool:
        return self._meter.thin(call, cotangent is not None, tuple(sorted(tangents)), slot, self._rowwise)

    def pairs(
        self, call: int, cotangent: Trace | None, tangents: Mapping[int, Trace], slot: int
    ) -> tuple[int, ...] | None:
        return self._meter.pairs(call, cotangent is not None, tuple(sorted(tangents)), slot, self._rowwise)

    def rows(self, call: int, cotangent: Trace | None, tangents: Mapping[int, Trace], slot: int) -> tuple[Work, int]:
        return self._meter.per_sample(call, cotangent is not None, tuple(sorted(tangents)), slot, self._rowwise)


@final
class _TallySink(AbstractSink):
    """Counts what the sinks of `disthess.sweep.panel` multiply."""

    def __init__(self, tally: Tally, graph: Graph, source: OutputSource | None, *, back: bool = False) -> None:
        self._tally = tally
        self._graph = graph
        self._source = source
        self._back = back
        self._kept: dict[str, tuple[int, list[int]]] = {}

    @property
    def per_sample(self) -> bool:
        return self._source is not None

    def take(self, leaf: int, rows: Any) -> None:
        self._multiply(leaf)

    def take_call(
        self, frame: Any, index: int, call: Any, slot: int, cotangent: Any, tangents: Mapping[int, Any]
    ) -> None:
        leaf = frame.slots(index)[slot]
        source = self._source
        if source is not None and leaf in source.shared:
            pairs = frame.rule(index).pairs(call, cotangent, tangents, slot)
            if pairs is not None:
                self._kept.setdefault(self._graph.nodes[leaf].op, (leaf, []))[1].extend(pairs)
                return
        if not self._back and self._formed_otherwise(frame, index, call, slot, cotangent, tangents):
            return
        work, again = frame.rule(index).rows(call, cotangent, tangents, slot)
        self._tally.work += Work(work.once, work.per_sample - again, work.per_tangent, work.per_pair)
        if again:
            self._tally.repeated.append((_size(self._graph.nodes[leaf]), again))
        self._multiply(leaf)

    def finish(self) -> None:
        for name, (leaf, rows) in self._kept.items():
            source, formed = self._source, outer_multiply_adds(rows)
            if source is not None and name == self._graph.nodes[source.leaf].op:
                width, multiplied = source.width, source.width * source.width
                self._tally.shared += (
                    SharedWork(back=formed * width, per_unit=source.rows * multiplied)
                    if self._back
                    else SharedWork(forward=formed * width + multiplied)
                )
                continue
            self._tally.work += Work(per_pair=formed * _size(self._graph.nodes[leaf]))
            self._multiply(leaf)

    def _formed_otherwise(
        self, frame: Any, index: int, call: Any, slot: int, cotangent: Any, tangents: Mapping[int, Any]
    ) -> bool:
        leaf, source = frame.slots(index)[slot], self._source
        if source is not None and leaf == source.leaf and cotangent is not None:
            self._tally.own = True
            return True
        readings = [frame.slots(index)[other] for other in tangents]
        if source is not None and frame.rule(index).thin(call, cotangent, tangents, slot):
            bent, moved, shape = cotangent is not None, bool(tangents), self._graph.nodes[leaf].shape
            if source.layer_rows == 1 and keeps_units(self._graph, source.index, readings):
                self._multiply_thin(leaf, bent, moved)
                return True
            thin = (source.tangents, source.width, (shape[0], shape[1]), bent, moved)
            if source.layer_rows > 1 and contracts_first(*thin):
                self._tally.per_unit += first_multiply_adds(*thin)
                return True
        return False

    def _multiply_thin(self, leaf: int, bent: bool, moved: bool) -> None:
        if bent:
            self._multiply(leaf)
        if moved and self._source is not None:
            self._tally.work += Work(
                per_pair=self._source.apart * self._source.width * self._graph.nodes[leaf].shape[0]
            )

    def _multiply(self, leaf: int) -> None:
        source = self._source
        if source is None:
            return
        products = source.apart * source.width * _size(self._graph.nodes[leaf])
        if self._back:
            self._tally.per_unit += source.rows * products
        else:
            self._tally.work += Work(per_pair=products)


def _size(node: Node) -> int:
    count = 1
    for size in node.shape:
        count *= size
    return count
