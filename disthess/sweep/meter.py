"""Multiply-adds of one rule's matrix products: what the rule itself does to tensors that have shapes and no data.

A rule is linear in its stacks and works sample by sample, so its products cost ``once + per_sample n + per_tangent K +
per_pair K n`` for K tangents on n samples; two values of each tell the four numbers. Nothing of the problem is computed: tensors
are on torch's *meta* device, or, for small calls and operations that need entries, two or three samples of ones. What counts is
what `torch.utils.flop_counter` counts: products of matrices and convolutions.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from disthess.graph.ir import Graph, Node
from disthess.planning.work import Work
from disthess.rules.base import Call, Units
from disthess.sweep.frame import Frame
from disthess.sweep.primal import Primal
from disthess.sweep.rowwise import Rowwise
from disthess.types import Span

TANGENTS = (2, 3)
"""Numbers of tangents that are tried; not 1, which torch may treat in another way."""

SMALL_ENTRIES = 2048
"""Calls with fewer entries are run, on ones: that is quicker than finding out their shapes."""

MEANINGLESS = (RuntimeError, NotImplementedError, IndexError, ValueError, TypeError)
"""What operations raise that cannot do without entries."""

Slots = tuple[int, ...]


@final
class RuleMeter:
    """Work of the rules of a graph's nodes, each kind of call measured once.

    Args:
        graph: The captured objective.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._primals: dict[str, Primal] = {}
        self._frames: dict[tuple[str, int], Frame] = {}
        self._known: dict[Hashable, tuple[Work, Slots]] = {}
        self._kinds: dict[int, Hashable] = {}
        most = graph.samples
        self._samples = (2, 3) if most > 2 else (1, 2) if most == 2 else (1,)

    def tangent(self, index: int, slots: Slots) -> Work:
        """``sum_a D_a x_a'`` of a node, tangents in ``slots``."""

        def run(frame: Frame, count: int) -> Slots:
            frame.rule(index).tangent(frame.call(index), _stacks(frame.call(index), slots, count))
            return ()

        return self._measured(index, ("tangent", slots), self._samples, run)[0]

    def cotangent(self, index: int, bent: bool, slots: Slots, wanted: Slots) -> tuple[Work, Slots]:
        """``D_a^T f'' + sum_b S_ab x_b'`` for the wanted slots, and those of them that are not zero.

        Args:
            index: The node.
            bent: Whether there is an ``f''``.
            slots: Those with tangents ``x_b'``.
            wanted: Slots a.
        """
        return self._measured(
            index, ("cotangent", bent, slots, wanted), self._samples, _cotangent(index, bent, slots, wanted)
        )

    def units(self, index: int, slot: int) -> Work:
        """``D_a x_a'`` of a node where the tangents of slot a are unit vectors."""

        def run(frame: Frame, count: int) -> Slots:
            frame.rule(index).add_units(frame.call(index), slot, _units(frame, index, slot, count), None)
            return ()

        return self._measured(index, ("units", slot), self._samples, run)[0]

    def units_back(self, index: int, slot: int, wanted: Slots) -> tuple[Work, Slots]:
        """``S_ab x_b'`` for the wanted slots a where the tangents of slot b are unit vectors, and those that are not zero."""

        def run(frame: Frame, count: int) -> Slots:
            found: dict[int, Tensor] = {}
            units = _units(frame, index, slot, count)
            frame.rule(index).add_units_back(frame.call(index), slot, units, wanted, found)
            return tuple(found)

        return self._measured(index, ("units back", slot, wanted), self._samples, run)

    def per_sample(
        self, index: int, bent: bool, slots: Slots, slot: int, rowwise: Rowwise | None = None
    ) -> tuple[Work, int]:
        """Rows of a slot for each sample, and how much of it is done anew whenever the stack is cut in two.

        Args:
            index: The node.
            bent: Whether there is an ``f''``.
            slots: Those with tangents.
            slot: The slot.
            rowwise: Where rows are taken for samples.
        """

        def run(frame: Frame, count: int) -> Slots:
            call = _call(frame, index, rowwise)
            cotangent = _stack(call.output, count) if bent else None
            rows = frame.rule(index).cotangent_per_sample(call, cotangent, _stacks(call, slots, count), slot)
            return () if rows is None else (slot,)

        work, closed = self._measured(
            index, ("per sample", bent, slots, slot, _place(rowwise, index)), self._samples, run
        )
        if closed or rowwise is not None:
            return work, 0
        alone = _cotangent(index, bent, slots, (slot,))
        work = self._measured(index, ("one sample", bent, slots, slot), (1,), alone)[0]
        return Work(per_sample=work.once, per_pair=work.per_tangent), work.once

    def pairs(self, index: int, bent: bool, slots: Slots, slot: int, rowwise: Rowwise | None = None) -> Slots | None:
        """Rows of each of the outer products that a slot's rows are sums of, or None where they are not."""

        def run(frame: Frame, count: int) -> Slots:
            call = _call(frame, index, rowwise)
            cotangent = _stack(call.output, count) if bent else None
            found = frame.rule(index).row_pairs(call, cotangent, _stacks(call, slots, count), slot)
            return () if found is None else tuple(left.shape[-2] for left, _ in found)

        return (
            self._measured(index, ("pairs", bent, slots, slot, _place(rowwise, index)), self._samples, run)[1] or None
        )

    def source_rows(self, index: int, slot: int) -> tuple[int, int] | None:
        """Rows of a sample and inputs of a slot that has an output basis (`AbstractRule.source_rows`), else None."""
        for device in self._devices(index):
            try:
                frame = self._frame(device, self._samples[0])
                rows = frame.rule(index).source_rows(frame.call(index), slot)
            except MEANINGLESS:
                continue
            return None if rows is None else (rows.shape[1], rows.shape[2])
        return None

    def keeps_apart(self, index: int, slot: int, axis: int) -> int | None:
        """`AbstractRule.keeps_apart` of a node."""
        frame = self._frame("meta", self._samples[0])
        return frame.rule(index).keeps_apart(frame.call(index), slot, axis)

    def takes_rows_for_samples(self, index: int, axis: int) -> bool:
        """`AbstractRule.takes_rows_for_samples` of a node."""
        frame = self._frame("meta", self._samples[0])
        return frame.rule(index).takes_rows_for_samples(frame.call(index), axis)

    def thin(self, index: int, bent: bool, slots: Slots, slot: int, rowwise: Rowwise | None = None) -> bool:
        """Whether rows of a slot are outer products of one vector a sample, so that `disthess.sweep.thin` multiplies them."""

        def run(frame: Frame, count: int) -> Slots:
            call = _call(frame, index, rowwise)
            cotangent = _stack(call.output, count) if bent else None
            rows = frame.rule(index).thin_rows(call, cotangent, _stacks(call, slots, count), slot)
            return () if rows is None else (slot,)

        return bool(self._measured(index, ("thin", bent, slots, slot, _place(rowwise, index)), self._samples, run)[1])

    def _measured(
        self, index: int, pattern: Hashable, samples: tuple[int, ...], run: Callable[[Frame, int], Slots]
    ) -> tuple[Work, Slots]:
        key = (self._kind(index), pattern)
        if key not in self._known:
            self._known[key] = self._measure(self._devices(index), samples, run)
        return self._known[key]

    def _devices(self, index: int) -> tuple[str, str]:
        call = self._frame("meta", self._samples[0]).call(index)
        entries = call.output.numel() + sum(value.numel() for value in call.inputs)
        return ("cpu", "meta") if entries < SMALL_ENTRIES else ("meta", "cpu")

    def _measure(
        self, devices: tuple[str, str], samples: tuple[int, ...], run: Callable[[Frame, int], Slots]
    ) -> tuple[Work, Slots]:
        for device in devices:
            try:
                return self._fit(samples, run, device)
            except MEANINGLESS:
                continue
        return Work(), ()

    def _fit(self, samples: tuple[int, ...], run: Callable[[Frame, int], Slots], device: str) -> tuple[Work, Slots]:
        few, many = TANGENTS
        start, found = _counted(run, self._frame(device, samples[0]), few)
        if not start:
            return Work(), found
        low = samples[0]
        slope = _counted(run, self._frame(device, low), many)[0] - start
        if len(samples) == 1:
            return Work(once=start - few * slope, per_tangent=slope), found
        step, high = _counted(run, self._frame(device, samples[1]), few)[0] - start, samples[1]
        pair = _counted(run, self._frame(device, high), many)[0] - start - slope - step
        per_tangent, per_sample = slope - pair * low, step - pair * few
        return Work(start - slope * few - per_sample * low, per_sample, per_tangent, pair), found

    def _frame(self, device: str, samples: int) -> Frame:
        if device not in self._primals:
            graph = self._graph
            values = tuple(None if node.kind == "size" else _blank(node, device) for node in graph.nodes)
            self._primals[device] = Primal(graph, values, values, graph.samples, 0.0)
        key = (device, samples)
        if key not in self._frames:
            self._frames[key] = Frame(self._primals[device], Span(0, samples))
        return self._frames[key]

    def _kind(self, index: int) -> Hashable:
        """Nodes of one kind cost the same: operation, arguments, shapes, and where samples lie."""
        if index not in self._kinds:
            call = self._frame("meta", self._samples[0]).call(index)
            inputs = tuple((tuple(value.shape), value.dtype) for value in call.inputs)
            arguments = tuple((name, repr(value)) for name, value in call.arguments.items())
            self._kinds[index] = (
                call.op, self._graph.nodes[index].output, inputs, arguments, tuple(call.output.shape), call.batch,
                call.batch_inputs,
            )  # fmt: skip
        return self._kinds[index]


def _cotangent(index: int, bent: bool, slots: Slots, wanted: Slots) -> Callable[[Frame, int], Slots]:
    def run(frame: Frame, count: int) -> Slots:
        call = frame.call(index)
        cotangent = _stack(call.output, count) if bent else None
        found = frame.rule(index).cotangent(call, cotangent, _stacks(frame.call(index), slots, count), wanted)
        return tuple(found)

    return run


def _counted(run: Callable[[Frame, int], Slots], frame: Frame, count: int) -> tuple[int, Slots]:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        found = run(frame, count)
    return counter.get_total_flops() // 2, found


def _call(frame: Frame, index: int, rowwise: Rowwise | None) -> Call:
    call = frame.call(index)
    return call if rowwise is None else rowwise.call(index, call)


def _place(rowwise: Rowwise | None, index: int) -> tuple[int, int] | None:
    return None if rowwise is None else (rowwise.count, rowwise.outputs[index])


def _stacks(call: Call, slots: Slots, count: int) -> Mapping[int, Tensor]:
    return {slot: _stack(call.inputs[slot], count) for slot in slots}


def _units(frame: Frame, index: int, slot: int, count: int) -> Units:
    value = frame.call(index).inputs[slot]
    return Units(tuple(value.shape), torch.zeros(count, dtype=torch.long, device=value.device))


def _stack(value: Tensor, count: int) -> Tensor:
    return value.expand(count, *value.shape)


def _blank(node: Node, device: str) -> Any:
    """A value of the node's shape that takes no memory: ones (of integers, zeros: they may be places)."""
    dtype = getattr(torch, node.dtype)
    return torch.full((), 1 if dtype.is_floating_point else 0, dtype=dtype, device=device).expand(node.shape)
