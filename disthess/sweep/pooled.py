"""Layers whose outputs are pooled before anything else reads them: tangents start behind the pooling, where they are fewer.

For a use ``z[n, r, o] = sum_j W[o, j] x[n, r, j]`` whose outputs pass through operations that keep channels o apart (activation
functions, pooling, a batch norm in evaluation), to ``h[n, s, o]`` with fewer places s than z has rows r, all that follows sees the
weight through h alone. With ``D[n, o, s, r] = dh[n, s, o] / dz[n, r, o]`` the panel of `disthess.sweep.panel` is

    H[(o, j), :] = sum_{n, s} y[o, n, s, j] M[n, (o, s), :]        y[o, n, s, j] = sum_r D[n, o, s, r] x[n, r, j]

with rows M of unit vectors of h: of a maximum over 2 x 2 places, a quarter as many. What bends between z and h (a tanh before an
average, say; ReLU and maxima do not) touches, each channel by itself, the layer's own block and parameters of one number a channel
alone: its bias and those on the way.

    H[(o, j), (o, b)] += sum_{n, r} C[j, n, r, o] x[n, r, b]       C[j, n, r, o] = sum_q S[n, o, r, q] x[n, q, j]
    H[(o, j), bias o] += sum_{n, r} C[j, n, r, o]                  S[n, o, r, q] = sum_s delta[n, s, o] d2h[n, s, o] / dz_r dz_q
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from disthess.graph.batch import rows_by_sample
from disthess.graph.ir import Graph, Node
from disthess.rules.base import Stack
from disthess.sweep.frame import Frame
from disthess.sweep.wave import keeps_curvature
from disthess.types import Part, Span

RESHAPED = frozenset(
    f"aten.{name}.default" for name in ("view", "reshape", "_unsafe_view", "unsqueeze", "_reshape_alias")
) | {"aten.flatten.using_ints", "aten.unflatten.int"}
"""Operations that leave entries in their order."""


@dataclass(frozen=True, slots=True)
class Step:
    """One operation on the way.

    Attributes:
        node: Which.
        slot: The tensor of it that comes from the layer.
        scales: (slot, leaf) of parameters that it reads, one number a channel.
    """

    node: int
    slot: int
    scales: tuple[tuple[int, int], ...]

    @property
    def wanted(self) -> tuple[int, ...]:
        """Slots of it that cotangents go back to."""
        return (self.slot, *(slot for slot, _ in self.scales))


@dataclass(frozen=True, slots=True)
class Pooling:
    """What the outputs of a layer pass through before anything else reads them.

    Attributes:
        steps: From the one that reads the layer to the one where tangents start.
        axis: Of the last one's value, that channels lie along.
        places: Of a sample and channel there.
    """

    steps: tuple[Step, ...]
    axis: int
    places: int

    @property
    def start(self) -> int:
        """The node where tangents start."""
        return self.steps[-1].node


@dataclass(frozen=True, slots=True)
class Bends:
    """What bends on the way, when all channels of a layer move by the values of some of its inputs j.

    Attributes:
        curvature: ``C[j, n, r, o]``, ``[J, n, R, O]``, or None for zero.
        scales: ``[J, O]`` of parameters on the way, by leaf.
    """

    curvature: Tensor | None
    scales: Mapping[int, Tensor]


Apart = Callable[[int, int, int], int | None]
"""`AbstractRule.keeps_apart` of a node's slot and axis."""


def pooling_behind(
    graph: Graph, layer: tuple[int, int, int], passed: Collection[int], keeps_apart: Apart
) -> Pooling | None:
    """The pooling that a layer's sweep may start behind, the fewest places of a channel; None where there is none.

    Args:
        graph: The captured objective.
        layer: Its node, the leaf of its weight, and the axis of channels.
        passed: Nodes on the way to targets: none of them may lie before the layer but its own leaves.
        keeps_apart: What operations do to an axis.
    """
    index, leaf, axis = layer
    node, channels = graph.nodes[index], graph.nodes[leaf].shape[0]
    if not only_own_leaves(graph, index, leaf, passed):
        return None
    samples = graph.samples if graph.independent else 1
    axis %= len(node.shape)
    fewest, found = _places(node, samples, channels), None
    steps: list[Step] = []
    while (following := _only_reader(graph, node)) is not None and following.region == node.region:
        slot = graph.slots(following.index).index(node.index)
        kept = keeps_apart(following.index, slot, axis)
        if kept is None or following.shape[kept] != channels or not _batch_before(following, kept):
            break
        scales = _scales(graph, following, slot, kept, channels)
        if scales is None:
            break
        node, axis = following, kept
        steps.append(Step(node.index, slot, scales))
        if _places(node, samples, channels) < fewest:
            fewest = _places(node, samples, channels)
            found = Pooling(tuple(steps), axis, fewest)
    return found


def start_places(frame: Frame, pooling: Pooling) -> Tensor:
    """Places of the entries of ``h`` in flat order, ``[n, s, o]``."""
    stack, node = _numbers(frame.value(pooling.start)), frame.node(pooling.start)
    return rows_by_sample(stack.movedim(1 + pooling.axis, -1), node.batch, frame.samples, lead=1)[0]


def pooled_inputs(frame: Frame, index: int, pooling: Pooling, inputs: Tensor, units: Span) -> Tensor:
    """``y[o, n, s, j]`` of some channels o, ``[U, n, s, j]``.

    Args:
        frame: The microbatch.
        index: The layer's node.
        pooling: What follows it.
        inputs: ``x``, ``[n, R, j]``.
        units: The channels.
    """
    value, places = frame.value(pooling.start), start_places(frame, pooling)
    # One tangent a place, of all samples and channels at once: they do not meet.
    ones = value.new_zeros(places.shape[1], value.numel()).scatter_(1, places.transpose(0, 1).flatten(1), 1.0)
    slope: Stack | None = ones.view(-1, *value.shape)
    for step in reversed(pooling.steps):
        slope = _back(frame, step, slope, None).get(step.slot)
    samples, rows, width = inputs.shape
    if slope is None:
        return inputs.new_zeros(units.size, samples, pooling.places, width)
    slopes = frame.rule(index).source_outputs(frame.call(index), slope)[..., units.start : units.stop]  # [s, n, R, U]
    found = torch.bmm(slopes.permute(1, 3, 0, 2).reshape(samples, -1, rows), inputs)
    return found.view(samples, units.size, -1, width).transpose(0, 1)


def bends(frame: Frame, index: int, pooling: Pooling, part: Part, inputs: Tensor) -> Bends:
    """What bends on the way.

    Args:
        frame: The microbatch.
        index: The layer's node.
        pooling: What follows it.
        part: Whose S are kept.
        inputs: ``x`` of some inputs, ``[n, R, J]``.
    """
    bent = [
        step for step in pooling.steps if keeps_curvature(frame, frame.node(step.node), part) and _bends(frame, step)
    ]
    if not bent:
        return Bends(None, {})
    passed = pooling.steps[: pooling.steps.index(bent[-1]) + 1]
    tangents: dict[int, Stack] = {}
    stack = _moved(frame, index, inputs)
    for step in passed:
        tangents[step.node] = stack
        if step != bent[-1]:
            stack = frame.rule(step.node).tangent(frame.call(step.node), {step.slot: stack})
    found: Stack | None = None
    scales: dict[int, Tensor] = {}
    for step in reversed(passed):
        back = _back(frame, step, found, tangents[step.node] if step in bent else None)
        found = back.get(step.slot)
        for slot, leaf in step.scales:
            if slot in back:
                scales[leaf] = back[slot].flatten(1) + scales.get(leaf, 0)
    if found is None:
        return Bends(None, scales)
    return Bends(frame.rule(index).source_outputs(frame.call(index), found), scales)


def _moved(frame: Frame, index: int, inputs: Tensor) -> Stack:
    """Tangents of a layer's output all of whose channels move by an input's values, ``[J, *output]``."""
    call = frame.call(index)
    places = frame.rule(index).source_outputs(call, _numbers(call.output))[0]
    moved = inputs.new_empty(inputs.shape[2], call.output.numel())
    moved[:, places.flatten()] = inputs.permute(2, 0, 1)[..., None].expand(-1, *places.shape).flatten(1)
    return moved.view(-1, *call.output.shape)


def _bends(frame: Frame, step: Step) -> bool:
    """Whether an operation has second derivatives."""
    return bool(_back(frame, step, None, torch.zeros_like(frame.call(step.node).inputs[step.slot])[None]))


def _back(frame: Frame, step: Step, cotangent: Stack | None, tangent: Stack | None) -> dict[int, Stack]:
    if cotangent is None and tangent is None:
        return {}
    tangents = {} if tangent is None else {step.slot: tangent}
    return frame.rule(step.node).cotangent(frame.call(step.node), cotangent, tangents, step.wanted)


def _numbers(value: Tensor) -> Tensor:
    return torch.arange(value.numel(), device=value.device).view(1, *value.shape)


def only_own_leaves(graph: Graph, index: int, leaf: int, passed: Collection[int]) -> bool:
    """Whether a layer reads no way to targets but its weight and a bias: one number a channel."""
    channels = graph.nodes[leaf].shape[:1]
    others = [graph.nodes[ref] for ref in graph.nodes[index].refs() if ref in passed and ref != leaf]
    return all(other.kind == "use" and other.shape == channels for other in others)


def _only_reader(graph: Graph, node: Node) -> Node | None:
    """The one live node that reads a node, if it does so once."""
    readers = [other for other in graph.nodes[node.index + 1 :] if other.live and node.index in other.refs()]
    if len(readers) != 1 or readers[0].kind != "op":
        return None
    return readers[0] if graph.slots(readers[0].index).count(node.index) == 1 else None


def _scales(graph: Graph, node: Node, slot: int, axis: int, channels: int) -> tuple[tuple[int, int], ...] | None:
    """(slot, leaf) of what else a node reads that is live, where that is one number a channel; None where it is not."""
    found = []
    for other, ref in enumerate(graph.slots(node.index)):
        read = graph.nodes[ref]
        if other == slot or not read.live:
            continue
        aligned = (1,) * (len(node.shape) - len(read.shape)) + read.shape
        leaf = graph.nodes[read.refs()[0]] if read.op in RESHAPED else read
        if leaf.kind != "use" or leaf.shape != (channels,) or not math.prod(aligned) == channels == aligned[axis]:
            return None
        found.append((other, leaf.index))
    return tuple(found)


def _batch_before(node: Node, axis: int) -> bool:
    """Whether samples lie along an axis before that of channels, where there are any."""
    return node.batch is None or 0 <= node.batch.dim < axis


def _places(node: Node, samples: int, channels: int) -> int:
    return math.prod(node.shape) // (samples * channels)
