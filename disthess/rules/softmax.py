"""Softmax and its kin along one axis.

* softmax ``p``: ``D x' = p' = p (x' - <p, x'>)``; with ``g = delta``, ``D^T g = p (g - <p, g>)`` moves along ``p'`` by
  ``S x' = p' (g - <p, g>) - p <p', g>``.
* log-softmax: ``D x' = x' - <p, x'>``, ``S x' = -(sum g) p (x' - <p, x'>)``.
* logsumexp: ``D x' = <p, x'>``, ``S x' = g p (x' - <p, x'>)``.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from disthess.rules.base import AbstractRule, Call, Stack, Stacks


@final
class SoftmaxRule(AbstractRule):
    """``softmax``."""

    __slots__ = ()

    @override
    def keeps_apart(self, call: Call, slot: int, axis: int) -> int | None:
        return _other(call, axis)

    @override
    def tangent(self, call: Call, tangents: Stacks) -> Stack:
        return _centred(call.output, tangents[0], _axis(call))

    @override
    def cotangent(
        self, call: Call, cotangent: Stack | None, tangents: Stacks, wanted: tuple[int, ...]
    ) -> dict[int, Stack]:
        axis, p = _axis(call), call.output
        if p.ndim == 0:
            return {}
        total = None if cotangent is None else _centred(p, cotangent, axis)
        if 0 in tangents:
            moved = _centred(p, tangents[0], axis)
            slope = call.once("slope", lambda: call.delta - (p * call.delta).sum(axis, keepdim=True))
            bend = moved * slope - p * (moved * call.delta).sum(axis, keepdim=True)
            total = bend if total is None else total + bend
        return {} if total is None else {0: total}


@final
class LogSoftmaxRule(AbstractRule):
    """``log_softmax``."""

    __slots__ = ()

    @override
    def keeps_apart(self, call: Call, slot: int, axis: int) -> int | None:
        return _other(call, axis)

    @override
    def tangent(self, call: Call, tangents: Stacks) -> Stack:
        stack = tangents[0]
        if call.output.ndim == 0:
            return torch.zeros_like(stack)
        return stack - (_probabilities(call) * stack).sum(_axis(call), keepdim=True)

    @override
    def cotangent(
        self, call: Call, cotangent: Stack | None, tangents: Stacks, wanted: tuple[int, ...]
    ) -> dict[int, Stack]:
        axis = _axis(call)
        p = _probabilities(call)
        total: Tensor | None = None
        if call.output.ndim == 0:
            return {}
        if cotangent is not None:
            total = cotangent - p * cotangent.sum(axis, keepdim=True)
        if 0 in tangents:
            weight = p * call.delta.sum(axis, keepdim=True)
            stack = tangents[0]
            bend = weight * (stack - (p * stack).sum(axis, keepdim=True))
            total = -bend if total is None else total.sub_(bend)
        return {} if total is None else {0: total}


@final
class LogSumExpRule(AbstractRule):
    """``logsumexp`` over some axes."""

    __slots__ = ()

    @override
    def tangent(self, call: Call, tangents: Stacks) -> Stack:
        axes = _axes(call)
        if call.inputs[0].ndim == 0:
            return tangents[0]
        total = (_weights(call) * tangents[0]).sum(axes, keepdim=True)
        return total if call.arguments["keepdim"] else total.reshape(total.shape[0], *call.output.shape)

    @override
    def cotangent(
        self, call: Call, cotangent: Stack | None, tangents: Stacks, wanted: tuple[int, ...]
    ) -> dict[int, Stack]:
        axes, p = _axes(call), _weights(call)
        total: Tensor | None = None
        if call.inputs[0].ndim == 0:
            return {} if cotangent is None else {0: cotangent}
        if cotangent is not None:
            total = p * cotangent.reshape(cotangent.shape[0], *_kept(call))
        if 0 in tangents:
            stack = tangents[0]
            bend = call.delta.reshape(_kept(call)) * p * (stack - (p * stack).sum(axes, keepdim=True))
            total = bend if total is None else total + bend
        return {} if total is None else {0: total}


def _centred(p: Tensor, stack: Stack, axis: int) -> Stack:
    if p.ndim == 0:
        return torch.zeros_like(stack)
    return p * (stack - (p * stack).sum(axis, keepdim=True))


def _probabilities(call: Call) -> Tensor:
    return call.once("probabilities", call.output.exp)


def _axis(call: Call) -> int:
    """Counted from the right, so that it holds for stacks too."""
    return int(call.arguments["dim"]) % max(1, call.output.ndim) - max(1, call.output.ndim)


def _other(call: Call, axis: int) -> int | None:
    """An axis that is not the one summed over."""
    return axis if axis - call.output.ndim != _axis(call) else None


def _axes(call: Call) -> tuple[int, ...]:
    ndim = max(1, call.inputs[0].ndim)
    return tuple(int(axis) % ndim - ndim for axis in call.arguments["dim"])


def _kept(call: Call) -> tuple[int, ...]:
    axes = {axis + call.inputs[0].ndim for axis in _axes(call)}
    return tuple(1 if axis in axes else size for axis, size in enumerate(call.inputs[0].shape))


def _weights(call: Call) -> Tensor:
    return torch.exp(call.inputs[0] - call.output.reshape(_kept(call)))


def rules() -> dict[str, AbstractRule]:
    """Operation to rule."""
    return {
        "aten.softmax.int": SoftmaxRule(),
        "aten._softmax.default": SoftmaxRule(),
        "aten.log_softmax.int": LogSoftmaxRule(),
        "aten._log_softmax.default": LogSoftmaxRule(),
        "aten.logsumexp.default": LogSumExpRule(),
    }
