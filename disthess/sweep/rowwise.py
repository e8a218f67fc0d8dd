"""Layers behind which rows of a sample do not meet: tangents of all rows at once, and rows taken for samples of their own.

For a use ``z[n, r, o] = sum_j W[o, j] x[n, r, j]`` whose row r moves row r alone of all that follows up to the sum that the loss is
(a network applied to every token; the last block of a transformer, behind its attention), one tangent a unit o bears the unit
vectors of all rows, ``z'[n, r, o] = 1``: what arrives at row r comes from row r. Parameters see (n, r) as samples that meet one row
each, and the formulas of `disthess.sweep.panel` for R = 1 hold with n R samples.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from disthess.graph.ir import BatchAxis, Graph, Node
from disthess.rules.base import Call, Stack
from disthess.sweep.pooled import RESHAPED, Apart, only_own_leaves

Place = int
"""The axis of a value that rows lie along; its batch axis where they lie within it, behind the sample."""


@dataclass(frozen=True, slots=True)
class Rowwise:
    """Where rows of samples lie, behind a layer.

    Attributes:
        count: Rows of a sample.
        outputs: By node that reads parameters, in its output.
        inputs: By such a node and slot, in what it reads; shared values are left out.
    """

    count: int
    outputs: Mapping[int, Place]
    inputs: Mapping[tuple[int, int], Place]

    def call(self, index: int, call: Call) -> Call:
        """A node's call where rows are samples."""
        return call.once("rows", lambda: self._made(index, call))

    def cotangent(self, index: int, call: Call, stack: Stack) -> Stack:
        """A stack at a node's output where rows are samples: ``[K, *value]`` with n R samples."""
        return _merged(stack, call.batch, self.outputs[index], call.samples, 1)

    def tangent(self, index: int, call: Call, slot: int, stack: Stack) -> Stack:
        """The same of what a node reads."""
        return _merged(stack, call.batch_inputs[slot], self.inputs[index, slot], call.samples, 1)

    def _made(self, index: int, call: Call) -> Call:
        places = [self.inputs.get((index, slot)) for slot in range(len(call.inputs))]
        inputs = tuple(
            value if place is None else _merged(value, axis, place, call.samples)
            for value, axis, place in zip(call.inputs, call.batch_inputs, places, strict=True)
        )
        axes = tuple(
            None if place is None or axis is None else BatchAxis(axis.dim, 1, 1)
            for axis, place in zip(call.batch_inputs, places, strict=True)
        )
        place, batch = self.outputs[index], call.batch
        return replace(
            call,
            inputs=inputs,
            output=_merged(call.output, call.batch, place, call.samples),
            delta=_merged(call.delta, call.batch, place, call.samples),
            batch=None if batch is None else BatchAxis(batch.dim, 1, 1),
            batch_inputs=axes,
            samples=call.samples * self.count,
        )


def rowwise_behind(
    graph: Graph, layer: tuple[int, int], passed: Collection[int], keeps_apart: Apart, takes: Callable[[int, int], bool]
) -> Rowwise | None:
    """How rows lie behind a layer, where none of them meets another; None where they may.

    Args:
        graph: The captured objective.
        layer: Its node and the leaf of its weight; its outputs are the last axis.
        passed: Nodes on the way to targets: none of them may lie before the layer but its own leaves.
        keeps_apart: What operations do to an axis.
        takes: `AbstractRule.takes_rows_for_samples` of a node and an axis.
    """
    index, leaf = layer
    start = _rows_of(graph.nodes[index])
    if start is None or not graph.independent or not only_own_leaves(graph, index, leaf, passed):
        return None
    place, count = start
    finder = _Finder(graph, count, keeps_apart)
    places = finder.behind(index, place)
    if (
        places is None
        or not finder.add_beside(index, passed, places)
        or not _reads_nothing_else(graph, index, passed, places)
    ):
        return None
    inputs: dict[tuple[int, int], Place] = {}
    readers = [at for at in places if any(ref in passed and graph.nodes[ref].kind == "use" for ref in graph.slots(at))]
    for at in readers:
        if not takes(at, places[at]) or not finder.lies(graph.nodes[at], places[at]):
            return None
        for slot, ref in enumerate(graph.slots(at)):
            if graph.nodes[ref].batch is not None:
                where = places[ref] if ref in places else finder.before(at, slot, places[at])
                if where is None or not finder.lies(graph.nodes[ref], where):
                    return None
                inputs[at, slot] = where
    return Rowwise(count, {at: places[at] for at in readers}, inputs)


@dataclass(frozen=True, slots=True)
class _Finder:
    """Follows rows through operations."""

    graph: Graph
    count: int
    keeps_apart: Apart

    def behind(self, index: int, place: Place) -> dict[int, Place] | None:
        """Where rows lie in all that follows from a node; None where they may meet."""
        places = {index: place}
        for node in self.graph.nodes[index + 1 :]:
            if node.kind != "op" or not node.live or node.region == "total":
                continue
            read = [(slot, ref) for slot, ref in enumerate(self.graph.slots(node.index)) if ref in places]
            found = {self.follow(node, slot, places[ref]) for slot, ref in read}
            if not found:
                continue
            where = found.pop()
            if found or where is None:
                return None
            places[node.index] = where
        return places

    def add_beside(self, index: int, passed: Collection[int], places: dict[int, Place]) -> bool:
        """Add nodes on the way to targets that meet what follows a node (the other branch of a gate), and say whether all do so."""
        for at in sorted((at for at in passed if at > index and at not in places), reverse=True):
            node = self.graph.nodes[at]
            if node.kind != "op":
                continue
            readers = [other for other in self.graph.nodes[at + 1 :] if other.live and at in other.refs()]
            found = {
                self.before(other.index, slot, places[other.index]) if other.index in places else None
                for other in readers
                if other.region != "total"
                for slot, ref in enumerate(self.graph.slots(other.index))
                if ref == at
            }
            where = found.pop() if found else None
            if found or where is None:
                return False
            places[at] = where
        return True

    def follow(self, node: Node, slot: int, place: Place) -> Place | None:
        """Where an operation leaves the rows of one of its inputs."""
        before = self.graph.nodes[self.graph.slots(node.index)[slot]]
        if node.batch is None or before.batch is None or node.batch.outer != 1:
            return None
        kept, within = self.keeps_apart(node.index, slot, place), place == before.batch.dim
        if kept is not None and (kept == node.batch.dim) == within and node.batch.inner == before.batch.inner:
            return kept
        if node.batch.dim != before.batch.dim or node.op not in RESHAPED:
            return None
        if place == before.batch.dim + 1 and node.shape == _without(before.shape, place):
            return node.batch.dim if node.batch.inner == before.shape[place] else None
        if within and before.shape == _without(node.shape, place + 1):
            return place + 1 if node.batch.inner == 1 and node.shape[place + 1] == before.batch.inner else None
        return None

    def before(self, at: int, slot: int, place: Place) -> Place | None:
        """Where the rows of a node's output come from in one of its inputs."""
        read = self.graph.nodes[self.graph.slots(at)[slot]]
        found = [axis for axis in range(len(read.shape)) if self.follow(self.graph.nodes[at], slot, axis) == place]
        return found[0] if len(found) == 1 else None

    def lies(self, node: Node, place: Place) -> bool:
        """Whether as many rows lie there."""
        if node.batch is None or node.batch.outer != 1:
            return False
        if place == node.batch.dim:
            return node.batch.inner == self.count
        return node.batch.inner == 1 and node.shape[place] == self.count


def _rows_of(layer: Node) -> tuple[Place, int] | None:
    """Where the rows of a layer's output lie, and how many of a sample there are."""
    batch, last = layer.batch, len(layer.shape) - 1
    if batch is None or batch.outer != 1 or batch.dim == last:
        return None
    others = [axis for axis in range(last) if axis != batch.dim and layer.shape[axis] > 1]
    if batch.inner > 1:
        return None if others else (batch.dim, batch.inner)
    return (others[0], layer.shape[others[0]]) if len(others) == 1 else None


def _reads_nothing_else(graph: Graph, index: int, passed: Collection[int], places: Collection[int]) -> bool:
    """Whether the way to targets leads nowhere but through what follows a layer, and parameters that it reads."""
    behind = all(at in places for at in passed if at > index and graph.nodes[at].kind != "use")
    reads = [ref for at in places if at != index for ref in graph.slots(at) if ref in passed and ref not in places]
    return behind and all(graph.nodes[ref].kind == "use" for ref in reads)


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """With an axis joined to the one before it."""
    return (*shape[: axis - 1], shape[axis - 1] * shape[axis], *shape[axis + 1 :]) if axis < len(shape) else ()


def _merged(value: Tensor, batch: BatchAxis | None, place: Place, samples: int, lead: int = 0) -> Tensor:
    """Samples and rows in the batch axis, ``n R`` of them, and one entry along the rows' own axis."""
    if batch is None or place == batch.dim:
        return value
    dims = (lead + batch.dim, lead + place)
    joined = value.movedim(dims, (lead, lead + 1)).flatten(lead, lead + 1)
    return joined.unsqueeze(lead + 1).movedim((lead, lead + 1), dims)
