"""Sweeps of the output basis: from the outputs of a source's layer, and back from its inputs. See `disthess.sweep.panel`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from disthess.errors import GraphError
from disthess.graph.waves import consumer
from disthess.rules.base import Stack
from disthess.sweep.buffers import AbstractWindow
from disthess.sweep.frame import Frame
from disthess.sweep.panel import InputSink, OutputSink, SweptLayer
from disthess.sweep.pooled import bends, pooled_inputs, start_places
from disthess.sweep.rows import Targets
from disthess.sweep.shortcut import NONE, Shortcut, shortcut_behind
from disthess.sweep.wave import forward, keeps_curvature, reverse
from disthess.types import Part, Span


@dataclass(frozen=True, slots=True)
class Wanted:
    """What rows are wanted of.

    Attributes:
        targets: The leaves.
        passed: Nodes on the way to them, from the loss down.
        shortcut: Of the source.
    """

    targets: Targets
    passed: tuple[int, ...]
    shortcut: Shortcut = NONE


def shortcut_of(frame: Frame, leaves: Sequence[int], passed: Collection[int]) -> Shortcut:
    """That of a source.

    Args:
        frame: Any microbatch.
        leaves: The source's.
        passed: Nodes on the way to its targets.
    """

    def keeps_apart(node: int, slot: int, axis: int) -> int | None:
        return frame.rule(node).keeps_apart(frame.call(node), slot, axis)

    def takes(node: int, axis: int) -> bool:
        return frame.rule(node).takes_rows_for_samples(frame.call(node), axis)

    return shortcut_behind(frame.primal.graph, leaves, passed, keeps_apart, takes)


def sweep_outputs(frame: Frame, leaf: int, wanted: Wanted, block: Span, windows: Mapping[Part, AbstractWindow]) -> None:
    """Add what unit vectors of a layer's outputs give to the rows of its weight.

    Args:
        frame: The microbatch.
        leaf: The use of the weight.
        wanted: The targets.
        block: Units.
        windows: Sums of the rows of those units, by part.

    Raises:
        GraphError: The layer has no output basis, which the plan should have known.
    """
    index, slot = consumer(frame.primal.graph, leaf)
    call, rule = frame.call(index), frame.rule(index)
    inputs = rule.source_rows(call, slot)
    if inputs is None:
        raise GraphError(
            f"{frame.node(index).name} has no output basis for {frame.node(leaf).op}; this is a planning fault."
        )
    pooling, rowwise = wanted.shortcut.pooling, wanted.shortcut.rowwise
    if pooling is not None:
        start, places, pooled = (
            pooling.start,
            start_places(frame, pooling),
            pooled_inputs(frame, index, pooling, inputs, block),
        )
    else:
        start, places, pooled = index, rule.source_outputs(call, _numbers(call.output)[None])[0], None
    if rowwise is not None:
        places, inputs = places.flatten(0, 1)[:, None], inputs.flatten(0, 1)[:, None]
    tangents = forward(frame, {start: _unit_vectors(frame.value(start), places, block)})
    layer = SweptLayer(index, leaf, inputs, block, pooled)
    for part, window in windows.items():
        reverse(frame, tangents, part, wanted.passed, OutputSink(wanted.targets, window, layer, rowwise))


def sweep_back(
    frame: Frame, leaf: int, wanted: Wanted, units: Span, stack: int, buffers: Mapping[Part, AbstractWindow]
) -> None:
    """Add what a weight gives back to its inputs, where targets move these.

    Args:
        frame: The microbatch.
        leaf: The use of the weight.
        wanted: The targets.
        units: All those whose rows are summed.
        stack: Inputs swept at a time.
        buffers: The sums, by part.
    """
    index, _ = consumer(frame.primal.graph, leaf)
    call, rule = frame.call(index), frame.rule(index)
    before, value = frame.slots(index)[rule.source_slot], call.inputs[rule.source_slot]
    if before not in wanted.passed:
        return
    deltas = rule.source_outputs(call, call.delta[None])[0][..., units.start : units.stop]
    places = rule.source_inputs(call, _numbers(value)[None] + 1)[0] - 1
    width = places.shape[-1]
    for start in range(0, width, stack):
        block = Span(start, min(start + stack, width))
        seeds = {before: _unit_vectors(value, places, block)}
        for part in [part for part in buffers if keeps_curvature(frame, frame.node(index), part)]:
            sink = InputSink(wanted.targets, buffers[part], deltas, block, width)
            reverse(frame, {}, part, wanted.passed, sink, seeds)


def add_bends(
    frame: Frame, leaf: int, wanted: Wanted, units: Span, stack: int, buffers: Mapping[Part, AbstractWindow]
) -> None:
    """Add what bends between a layer's outputs and where tangents start.

    Args:
        frame: The microbatch.
        leaf: The use of the weight.
        wanted: The targets.
        units: All those whose rows are summed.
        stack: Inputs at a time.
        buffers: The sums, by part.
    """
    index, slot = consumer(frame.primal.graph, leaf)
    inputs, pooling = frame.rule(index).source_rows(frame.call(index), slot), wanted.shortcut.pooling
    if inputs is None or pooling is None:
        return
    width, numbers = inputs.shape[2], torch.arange(units.size, device=inputs.device)
    by_row, chosen = inputs.flatten(0, 1), slice(units.start, units.stop)
    for part, buffer in buffers.items():
        for start in range(0, width, stack):
            some = slice(start, min(start + stack, width))
            found = bends(frame, index, pooling, part, inputs[..., some])
            moved = {leaf: scale[:, chosen].T[..., None] for leaf, scale in found.scales.items()}
            if found.curvature is not None:
                curvature = found.curvature[..., chosen].permute(3, 0, 1, 2).flatten(2)  # [U, J, n R]
                moved[leaf] = curvature @ by_row
                moved |= {bias: curvature.sum(2, keepdim=True) for bias in frame.slots(index) if bias != leaf}
            for target in moved.keys() & wanted.targets.keys.keys():
                sums = buffer.take(wanted.targets.block(target)).view(units.size, width, -1)[:, some]
                own = sums.unflatten(2, (-1, moved[target].shape[2]))
                own[numbers, :, units.start + numbers] += moved[target]


def _numbers(value: Tensor) -> Tensor:
    return torch.arange(value.numel(), device=value.device).reshape(value.shape)


def _unit_vectors(value: Tensor, places: Tensor, block: Span) -> Stack:
    """Of every sample at once, ``[U R, *value]``, from the places of entries of rows, ``[n, R, entries]``; -1 for none."""
    ones = places[:, :, block.start : block.stop].permute(2, 1, 0).reshape(-1, len(places))
    found = value.new_zeros(len(ones), value.numel())
    return found.scatter_(1, ones.clamp(min=0), (ones >= 0).to(value.dtype)).view(-1, *value.shape)
