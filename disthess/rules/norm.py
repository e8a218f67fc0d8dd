"""Layer normalisation ``y = w x^ + b`` with ``x^ = (x - mean) r``, ``r = 1 / sqrt(var + eps)`` over the last axes.

With ``<.>`` the mean over those axes and ``N u = r (u - <u> - x^ <x^ u>)`` (symmetric):

* ``x^' = N x'``; ``y' = w x^' + w' x^ + b'``
* to x, with ``g = w delta``: ``N (w y'' + w' delta) - s N g - r (x^' <x^ g> + x^ <x^' g>)``, ``s = r <x^ x'>``
* to w: sums over rows of ``y'' x^ + delta x^'``; to b: sums of ``y''``
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from disthess.graph.batch import rows_by_sample
from disthess.rules.base import AbstractRule, Call, Slot, Stack, Stacks


@dataclass(frozen=True, slots=True)
class _Point:
    """A call's normalised input and its parts."""

    axes: tuple[int, ...]
    normal: Tensor
    scale: Tensor
    weight: Tensor | None

    def apply(self, stack: Tensor) -> Tensor:
        """``N u``."""
        level = stack.mean(self.axes, keepdim=True)
        along = (self.normal * stack).mean(self.axes, keepdim=True)
        return self.scale * (stack - level - self.normal * along)

    def weighted(self, stack: Tensor) -> Tensor:
        """``w u``."""
        return stack if self.weight is None else stack * self.weight


@final
class LayerNormRule(AbstractRule):
    """``layer_norm``; slots are x and, if given, w and b."""

    __slots__ = ()

    @override
    def tangent(self, call: Call, tangents: Stacks) -> Stack:
        point, weight, bias = _point(call), call.slot("weight"), call.slot("bias")
        total: Tensor | None = None
        if 0 in tangents:
            total = point.weighted(point.apply(tangents[0]))
        if weight is not None and weight in tangents:
            term = _lift(tangents[weight], call) * point.normal
            total = term if total is None else total + term
        if bias is not None and bias in tangents:
            term = _lift(tangents[bias], call).expand(-1, *call.output.shape)
            total = term if total is None else total + term
        if total is None:
            raise ValueError("a tangent needs at least one slot")
        return total

    @override
    def cotangent(
        self, call: Call, cotangent: Stack | None, tangents: Stacks, wanted: tuple[int, ...]
    ) -> dict[int, Stack]:
        found: dict[int, Stack] = {}
        for slot in wanted:
            whole = (
                self._to_input(call, cotangent, tangents)
                if slot == 0
                else self._to_affine(call, cotangent, tangents, slot)
            )
            if whole is not None and slot:
                shape = call.inputs[slot].shape
                whole = whole.reshape(whole.shape[0], -1, *shape).sum(1)
            if whole is not None:
                found[slot] = whole
        return found

    @override
    def cotangent_per_sample(self, call: Call, cotangent: Stack | None, tangents: Stacks, slot: int) -> Stack | None:
        if slot == 0 or call.batch is None:
            return None
        whole = self._to_affine(call, cotangent, tangents, slot)
        if whole is None:
            return None
        return rows_by_sample(whole, call.batch, call.samples, lead=1, tail=call.inputs[slot].ndim).sum(2)

    @override
    def keeps_apart(self, call: Call, slot: int, axis: int) -> int | None:
        return axis if slot == 0 and self.takes_rows_for_samples(call, axis) else None

    @override
    def takes_rows_for_samples(self, call: Call, axis: int) -> bool:
        return axis < call.output.ndim - len(call.arguments["normalized_shape"])

    def _to_input(self, call: Call, cotangent: Stack | None, tangents: Stacks) -> Stack | None:
        point, weight = _point(call), call.slot("weight")
        inner = None if cotangent is None else point.weighted(cotangent)
        if weight is not None and weight in tangents:
            term = _lift(tangents[weight], call) * call.delta
            inner = term if inner is None else inner + term
        total = None if inner is None else point.apply(inner)
        if 0 in tangents:
            bend = _bend(point, call.once("slope", lambda: _slope(point, call.delta)), tangents[0])
            total = bend if total is None else total + bend
        return total

    def _to_affine(self, call: Call, cotangent: Stack | None, tangents: Stacks, slot: int) -> Stack | None:
        """Before the sum over rows, ``[K, *output]``."""
        if slot != call.slot("weight"):
            return cotangent
        point = _point(call)
        total = None if cotangent is None else cotangent * point.normal
        if 0 in tangents:
            term = call.delta * point.apply(tangents[0])
            total = term if total is None else total + term
        return total

    @override
    def entry_multiply_adds(self, shapes: tuple[tuple[int, ...], ...], shape: tuple[int, ...]) -> int:
        count = 4
        for size in shape:
            count *= size
        return count


@dataclass(frozen=True, slots=True)
class _Slope:
    """``g = w delta``, ``N g`` and ``<x^ g>``."""

    here: Tensor
    projected: Tensor
    held: Tensor


def _slope(point: _Point, delta: Tensor) -> _Slope:
    here = point.weighted(delta)
    return _Slope(here, point.apply(here), (point.normal * here).mean(point.axes, keepdim=True))


def _bend(point: _Point, slope: _Slope, stack: Stack) -> Stack:
    moved = point.apply(stack)
    s = point.scale * (point.normal * stack).mean(point.axes, keepdim=True)
    shifted = (moved * slope.here).mean(point.axes, keepdim=True)
    return -s * slope.projected - point.scale * (moved * slope.held + point.normal * shifted)


def _point(call: Call) -> _Point:
    return call.once("point", lambda: _normalised(call))


def _normalised(call: Call) -> _Point:
    axes = tuple(range(-len(call.arguments["normalized_shape"]), 0))
    x = call.inputs[0]
    centred = x - x.mean(axes, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(axes, keepdim=True) + float(call.arguments["eps"]))
    weight = call.arguments["weight"]
    return _Point(axes, centred * scale, scale, call.inputs[weight.index] if isinstance(weight, Slot) else None)


def _lift(stack: Stack, call: Call) -> Stack:
    missing = call.output.ndim - (stack.ndim - 1)
    return stack.reshape(stack.shape[0], *[1] * missing, *stack.shape[1:])


def rules() -> dict[str, AbstractRule]:
    """Operation to rule."""
    return {"aten.layer_norm.default": LayerNormRule()}
