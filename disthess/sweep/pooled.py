"""Layers whose outputs are pooled before anything else reads them: tangents start behind the pooling, where they are fewer.

For a use ``z[n, r, o] = sum_j W[o, j] x[n, r, j]`` whose outputs pass through activation functions and pooling that keep channels o
apart, to ``h[n, s, o]`` with fewer places s than z has rows r, everything that follows sees the weight through h alone. With
``D[n, o, s, r] = dh[n, s, o] / dz[n, r, o]`` the panel of `disthess.sweep.panel` is

    H[(o, j), :] = sum_{n, s} y[o, n, s, j] M[n, (o, s), :]        y[o, n, s, j] = sum_r D[n, o, s, r] x[n, r, j]

with rows M of unit vectors of h: of a maximum over 2 x 2 places, a quarter as many. What bends between z and h (a tanh before an
average, say; ReLU and maxima do not) touches the layer's own block and its bias alone, and each channel by itself:

    H[(o, j), (o, b)] += sum_{n, r} C[j, n, r, o] x[n, r, b]       C[j, n, r, o] = sum_q S[n, o, r, q] x[n, q, j]
    H[(o, j), bias o] += sum_{n, r} C[j, n, r, o]                  S[n, o, r, q] = sum_s delta[n, s, o] d2h[n, s, o] / dz_r dz_q
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from disthess.graph.batch import rows_by_sample
from disthess.graph.ir import Graph, Node
from disthess.rules.base import Stack
from disthess.sweep.frame import Frame
from disthess.sweep.wave import keeps_curvature
from disthess.types import Part, Span


@dataclass(frozen=True, slots=True)
class Pooling:
    """What the outputs of a layer pass through before anything else reads them.

    Attributes:
        nodes: From the one that reads the layer to the one where tangents start.
        axis: Of the last one's value, that channels lie along.
        places: Of a sample and channel there.
    """

    nodes: tuple[int, ...]
    axis: int
    places: int

    @property
    def start(self) -> int:
        """Where tangents start."""
        return self.nodes[-1]


def pooling_behind(
    graph: Graph, layer: tuple[int, int, int], passed: Collection[int], keeps_apart: Callable[[int, int], int | None]
) -> Pooling | None:
    """The pooling that a layer's sweep may start behind, the fewest places of a channel; None where there is none.

    Args:
        graph: The captured objective.
        layer: Its node, the leaf of its weight, and the axis of channels.
        passed: Nodes on the way to targets: none of them may lie before the layer but its own leaves.
        keeps_apart: `AbstractRule.keeps_apart` of a node and an axis.
    """
    index, leaf, axis = layer
    node, channels = graph.nodes[index], graph.nodes[leaf].shape[0]
    if any(ref in passed and not _own_leaf(graph.nodes[ref], leaf, channels) for ref in node.refs()):
        return None
    samples = graph.samples if graph.independent else 1
    axis %= len(node.shape)
    nodes: list[int] = []
    found, fewest = None, _places(node, samples, channels)
    while (following := _only_reader(graph, node)) is not None and following.region == node.region:
        kept = keeps_apart(following.index, axis)
        if kept is None or following.shape[kept] != channels or not _batch_before(following, kept):
            break
        node, axis = following, kept
        nodes.append(node.index)
        if _places(node, samples, channels) < fewest:
            fewest = _places(node, samples, channels)
            found = Pooling(tuple(nodes), axis, fewest)
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
    for node in reversed(pooling.nodes):
        slope = _back(frame, node, slope, None)
    samples, rows, width = inputs.shape
    if slope is None:
        return inputs.new_zeros(units.size, samples, pooling.places, width)
    slopes = frame.rule(index).source_outputs(frame.call(index), slope)[..., units.start : units.stop]  # [s, n, R, U]
    found = torch.bmm(slopes.permute(1, 3, 0, 2).reshape(samples, -1, rows), inputs)
    return found.view(samples, units.size, -1, width).transpose(0, 1)


def bends(frame: Frame, index: int, pooling: Pooling, part: Part, inputs: Tensor) -> Tensor | None:
    """``C[j, n, r, o]`` of some inputs j and all channels, ``[J, n, R, o]``; None where nothing bends.

    Args:
        frame: The microbatch.
        index: The layer's node.
        pooling: What follows it.
        part: Whose S are kept.
        inputs: ``x`` of these inputs, ``[n, R, J]``.
    """
    kept = [node for node in pooling.nodes if keeps_curvature(frame, frame.node(node), part) and _bends(frame, node)]
    if not kept:
        return None
    passed = pooling.nodes[: pooling.nodes.index(kept[-1]) + 1]
    tangents: dict[int, Stack] = {}
    stack = _moved(frame, index, inputs)
    for node in passed:
        tangents[node] = stack
        if node != kept[-1]:
            stack = frame.rule(node).tangent(frame.call(node), {0: stack})
    found: Stack | None = None
    for node in reversed(passed):
        found = _back(frame, node, found, tangents[node] if node in kept else None)
    return None if found is None else frame.rule(index).source_outputs(frame.call(index), found)


def _moved(frame: Frame, index: int, inputs: Tensor) -> Stack:
    """Tangents of a layer's output all of whose channels move by an input's values, ``[J, *output]``."""
    call = frame.call(index)
    places = frame.rule(index).source_outputs(call, _numbers(call.output))[0]
    moved = inputs.new_empty(inputs.shape[2], call.output.numel())
    moved[:, places.flatten()] = inputs.permute(2, 0, 1)[..., None].expand(-1, *places.shape).flatten(1)
    return moved.view(-1, *call.output.shape)


def _bends(frame: Frame, node: int) -> bool:
    """Whether an operation has second derivatives."""
    return _back(frame, node, None, torch.zeros_like(frame.call(node).inputs[0])[None]) is not None


def _numbers(value: Tensor) -> Tensor:
    return torch.arange(value.numel(), device=value.device).view(1, *value.shape)


def _back(frame: Frame, node: int, cotangent: Stack | None, tangent: Stack | None) -> Stack | None:
    if cotangent is None and tangent is None:
        return None
    tangents = {} if tangent is None else {0: tangent}
    return frame.rule(node).cotangent(frame.call(node), cotangent, tangents, (0,)).get(0)


def _own_leaf(node: Node, leaf: int, channels: int) -> bool:
    """The weight, or a bias: one number a channel."""
    return node.index == leaf or (node.kind == "use" and node.shape == (channels,))


def _only_reader(graph: Graph, node: Node) -> Node | None:
    """The one live node that reads a node, once, where it reads no other tensor."""
    readers = [other for other in graph.nodes[node.index + 1 :] if other.live and node.index in other.refs()]
    if len(readers) != 1 or readers[0].kind != "op":
        return None
    tensors = [ref for ref in readers[0].refs() if graph.nodes[ref].kind != "size"]
    return readers[0] if tensors == [node.index] else None


def _batch_before(node: Node, axis: int) -> bool:
    """Whether samples lie along an axis before that of channels, where there are any."""
    return node.batch is None or 0 <= node.batch.dim < axis


def _places(node: Node, samples: int, channels: int) -> int:
    return math.prod(node.shape) // (samples * channels)
