"""What the block of a linear layer is made of: curvature at its outputs, sample by sample, and its input rows.

For a use ``z[n, r, o] = sum_j W[o, j] x[n, r, j]`` the layer's own block is ``sum_n sum_rs H^n[r, s] (x) x_r x_s^T``, and
that by an earlier layer w ``sum_n sum_rs (H^n (x) x_v,r + delta_v,r (x) X^n) x_w,s^T``: see `disthess.linalg.rearranged`.
Neither is formed here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from disthess.errors import GraphError, PlanError
from disthess.graph.batch import rows_by_sample
from disthess.graph.ir import Graph
from disthess.graph.waves import consumer, leading_to
from disthess.rules.base import Stack
from disthess.sweep.activation import unit_activations
from disthess.sweep.frame import Frame
from disthess.sweep.primal import Primal
from disthess.sweep.wave import AbstractSink, forward, reverse
from disthess.types import Part, Span
from disthess.units import human_bytes

STACK_BYTES = 64 << 20
"""Aim for the bytes of one stack of seeds."""

MICROBATCH = 256
"""Samples swept at once."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer by the parameters that enter it.

    Attributes:
        weight: First name of its weight.
        bias: First name of its bias, which is then the last input, or None.
    """

    weight: str
    bias: str | None

    @property
    def names(self) -> tuple[str, ...]:
        """Weight and bias."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class OwnCurvature:
    """Of one layer.

    Attributes:
        curvature: ``[n, R, o, R, o]``, all batches.
        rows: ``[n, R, i]``; a bias's column of ones is the last.
    """

    curvature: Tensor
    rows: Tensor


@dataclass(frozen=True, slots=True)
class CrossCurvature:
    """Of a later layer v and an earlier one w; see `disthess.linalg.rearranged.CrossRearranged`."""

    curvature: Tensor
    deltas: Tensor
    moved: Tensor
    later: Tensor
    earlier: Tensor


@final
class _Place:
    """Where a layer stands in one graph."""

    def __init__(self, graph: Graph, layer: Layer) -> None:
        leaves = [self._only_use(graph, name) for name in layer.names]
        self.index, slot = consumer(graph, leaves[0])
        node = graph.nodes[self.index]
        refs = [ref for ref in node.refs() if graph.nodes[ref].kind != "size"]
        together = all(consumer(graph, leaf)[0] == self.index for leaf in leaves)
        if node.op != "aten.linear.default" or slot != 1 or refs.count(leaves[0]) != 1 or not together:
            raise GraphError(
                f"{' and '.join(layer.names)} do not enter as weight and bias of one linear layer (but {node.name}, "
                f"{node.op.split('.')[1]}). Compute the block into a store and give that."
            )
        self.input = refs[0]
        self.slot = slot
        self.biased = layer.bias is not None

    @staticmethod
    def _only_use(graph: Graph, name: str) -> int:
        uses = [node.index for node in graph.nodes if node.kind == "use" and node.live and node.op == name]
        if len(uses) != 1:
            raise GraphError(
                f"{name} is used {len(uses)} times, and the parts of a block are known for a parameter with one use. Compute the "
                "block into a store and give that."
            )
        return uses[0]

    def rows(self, frame: Frame) -> Tensor:
        """``[n, R, i]``."""
        call = frame.call(self.index)
        rows = frame.rule(self.index).source_rows(call, self.slot)
        if rows is None:
            raise GraphError(f"{frame.node(self.index).name} has no input rows; this is a planning fault.")
        return torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], dim=2) if self.biased else rows


def own_curvature(primals: Sequence[Primal], layer: Layer, part: Part, free_bytes: int) -> OwnCurvature:
    """The pieces of a layer's own block.

    Args:
        primals: One per batch.
        layer: Which; each parameter with one use.
        part: Of which matrix.
        free_bytes: Memory that may be used.

    Raises:
        GraphError: It is no linear layer, or is used several times.
        PlanError: The pieces do not fit in memory, with the sizes.
    """
    curvature, rows = [], []
    for primal in primals:
        place = _Place(primal.graph, layer)
        for frame in _frames(primal):
            inputs = place.rows(frame)
            samples, count, _ = inputs.shape
            outputs = frame.node(place.index).shape[-1]
            _check(layer, primal.samples * (count * outputs) ** 2, inputs, free_bytes)
            zero = inputs.new_zeros(1, samples, count * outputs)
            found = [
                cotangents.get(place.index, zero.expand(len(next(iter(tangents.values()))), -1, -1))
                for tangents, cotangents in _sweeps(frame, place.index, (place.index,), part)
            ]
            stacked = torch.cat(found).permute(1, 0, 2)
            curvature.append(stacked.reshape(samples, count, outputs, count, outputs))
            rows.append(inputs)
    return OwnCurvature(torch.cat(curvature), torch.cat(rows))


def cross_curvature(
    primals: Sequence[Primal], first: Layer, second: Layer, part: Part, free_bytes: int
) -> tuple[CrossCurvature, bool]:
    """The pieces of the block of two layers, and whether ``first`` is the later one.

    Raises:
        GraphError: One is no linear layer, or is used several times.
        PlanError: The pieces do not fit in memory, with the sizes.
    """
    places = [(_Place(primal.graph, first), _Place(primal.graph, second)) for primal in primals]
    swapped = places[0][0].index > places[0][1].index
    pieces: list[CrossCurvature] = []
    for primal, (a, b) in zip(primals, places, strict=True):
        later, earlier = (a, b) if swapped else (b, a)
        for frame in _frames(primal):
            inputs, before = later.rows(frame), earlier.rows(frame)
            width = inputs.shape[1] * (inputs.shape[2] + frame.node(later.index).shape[-1])
            outputs = before.shape[1] * frame.node(earlier.index).shape[-1]
            _check(first, primal.samples * outputs * width, inputs, free_bytes)
            pieces.append(_cross(frame, later, earlier, inputs, before, part))
    joined = (torch.cat([getattr(piece, name) for piece in pieces]) for name in CrossCurvature.__slots__)
    return CrossCurvature(*joined), swapped


def _cross(frame: Frame, later: _Place, earlier: _Place, inputs: Tensor, before: Tensor, part: Part) -> CrossCurvature:
    node, samples, rows = frame.node(later.index), frame.samples, inputs.shape[1]
    width = inputs.shape[2] - later.biased
    curvature, moved = [], []
    for tangents, cotangents in _sweeps(frame, earlier.index, (later.index,), part):
        count = next(iter(tangents.values())).shape[0]
        zero = inputs.new_zeros(count, samples, rows * node.shape[-1])
        curvature.append(cotangents.get(later.index, zero))
        tangent = tangents.get(later.input)
        axis = frame.node(later.input).batch
        flat = inputs.new_zeros(count, samples, rows * width)
        flat = flat if tangent is None else rows_by_sample(tangent, axis, samples, lead=1, tail=0)
        apart = flat.reshape(count, samples, rows, width)
        # A bias's input is 1 whatever happens.
        moved.append(torch.nn.functional.pad(apart, (0, 1)) if later.biased else apart)
    kept = part == "hessian" or node.in_model == (part == "residual")
    deltas = rows_by_sample(frame.delta(later.index), node.batch, samples)
    sources = (before.shape[1], -1)
    return CrossCurvature(
        torch.cat(curvature).reshape(*sources, samples, rows, node.shape[-1]).permute(2, 3, 4, 0, 1),
        deltas if kept else torch.zeros_like(deltas),
        torch.cat(moved).reshape(*sources, samples, rows, inputs.shape[2]).permute(2, 3, 4, 0, 1),
        inputs,
        before,
    )


def _sweeps(
    frame: Frame, source: int, targets: tuple[int, ...], part: Part
) -> Iterator[tuple[dict[int, Stack], dict[int, Tensor]]]:
    """From unit vectors of a node's output, stack by stack: all tangents, and ``[K, n, entries]`` of each target's cotangent."""
    entries = frame.value(source).numel() // frame.samples
    graph = frame.primal.graph
    widest = max(math.prod(node.shape) for node in graph.nodes if node.live)
    widest = widest * frame.samples // (graph.samples if graph.independent else 1)
    step = max(1, STACK_BYTES // (8 * max(widest, 1)))
    passed = leading_to(graph, targets)
    for start in range(0, entries, step):
        block = Span(start, min(start + step, entries))
        tangents = forward(frame, {source: unit_activations(frame, source, block)})
        sink = _Collect(targets)
        reverse(frame, tangents, part, passed, sink)
        yield tangents, sink.found


@final
class _Collect(AbstractSink):
    """Keeps what arrives at a few nodes."""

    def __init__(self, targets: tuple[int, ...]) -> None:
        self._targets = targets
        self.found: dict[int, Tensor] = {}

    @property
    @override
    def per_sample(self) -> bool:
        return False

    @override
    def take(self, leaf: int, rows: Stack) -> None:
        raise GraphError("a sweep between layers ran into a parameter; this is a planning fault.")

    @override
    def see(self, frame: Frame, index: int, cotangent: Stack) -> None:
        if index in self._targets:
            node = frame.node(index)
            self.found[index] = rows_by_sample(cotangent, node.batch, frame.samples, lead=1, tail=0)


def _frames(primal: Primal) -> Iterator[Frame]:
    for start in range(0, primal.samples, MICROBATCH):
        yield Frame(primal, Span(start, min(start + MICROBATCH, primal.samples)))


def _check(layer: Layer, entries: int, like: Tensor, free_bytes: int) -> None:
    needed = 4 * entries * like.element_size()
    if needed > free_bytes:
        raise PlanError(
            f"the curvature at the outputs of {layer.weight}, sample by sample, takes up to {human_bytes(needed)} of memory and "
            f"{human_bytes(free_bytes)} are available. Give fewer samples, or compute the block into a store and give that."
        )
