"""Convolutions: bilinear in input and weight, linear in the bias.

K tangents of the input are K times as many samples of one convolution; K tangents of the weight are K times as many output
channels of one convolution, or, where channels are grouped, derivatives by autograd.
"""

from __future__ import annotations

from typing import final

from torch import Tensor
from typing_extensions import override

from disthess.rules.base import AbstractRule, Call, Stack, Stacks
from disthess.rules.generic import GenericRule

INPUT, WEIGHT, BIAS = 0, 1, 2


@final
class ConvolutionRule(AbstractRule):
    """``conv1d``, ``conv2d``, ``conv3d`` and transposed ones; slots are input, weight and, if given, bias.

    Args:
        axes: Number of spatial axes.
        transposed: Whether it is a transposed convolution.
    """

    __slots__ = ("_axes", "_generic", "_transposed")

    def __init__(self, axes: int, transposed: bool = False) -> None:
        self._axes = axes
        self._transposed = transposed
        self._generic = GenericRule()

    @override
    def tangent(self, call: Call, tangents: Stacks) -> Stack:
        if call.inputs[INPUT].ndim != self._axes + 2:
            return self._generic.tangent(call, tangents)
        total: Tensor | None = None
        if INPUT in tangents:
            total = self._on_inputs(call, tangents[INPUT], call.inputs[WEIGHT])
        if WEIGHT in tangents:
            term = self._on_weights(call, tangents[WEIGHT])
            total = term if total is None else total + term
        if BIAS in tangents:
            shift = tangents[BIAS].reshape(-1, 1, call.output.shape[1], *[1] * self._axes)
            total = shift.expand(-1, *call.output.shape) if total is None else total + shift
        if total is None:
            raise ValueError("a tangent needs at least one slot")
        return total

    @override
    def cotangent(
        self, call: Call, cotangent: Stack | None, tangents: Stacks, wanted: tuple[int, ...]
    ) -> dict[int, Stack]:
        found: dict[int, Stack] = {}
        if BIAS in wanted and cotangent is not None:
            spatial = range(cotangent.ndim - self._axes, cotangent.ndim)
            found[BIAS] = cotangent.sum((1, *spatial) if call.inputs[INPUT].ndim == self._axes + 2 else tuple(spatial))
        held = {slot: stack for slot, stack in tangents.items() if slot != BIAS}
        rest = tuple(slot for slot in wanted if slot != BIAS)
        if rest and (cotangent is not None or held):
            found.update(self._generic.cotangent(call, cotangent, held, rest))
        return found

    @override
    def cotangent_per_sample(self, call: Call, cotangent: Stack | None, tangents: Stacks, slot: int) -> Stack | None:
        if slot != BIAS or cotangent is None or call.batch is None or call.batch.rows_per_sample != 1:
            return None
        return cotangent.flatten(3).sum(3) if cotangent.ndim > 3 else cotangent

    def _on_inputs(self, call: Call, stack: Stack, weight: Tensor) -> Stack:
        folded = stack.reshape(-1, *stack.shape[2:])
        result = _plain(call, folded, weight)
        return result.reshape(stack.shape[0], -1, *result.shape[1:])

    def _on_weights(self, call: Call, stack: Stack) -> Stack:
        groups = int(call.arguments["groups"])
        if groups != 1:
            return self._generic.tangent(call, {WEIGHT: stack})
        count = stack.shape[0]
        if self._transposed:
            folded = stack.movedim(0, 1).reshape(stack.shape[1], -1, *stack.shape[3:])
        else:
            folded = stack.reshape(-1, *stack.shape[2:])
        result = _plain(call, call.inputs[INPUT], folded)
        return result.unflatten(1, (count, -1)).movedim(1, 0)


def _plain(call: Call, source: Tensor, weight: Tensor) -> Tensor:
    """The same convolution of other operands, without bias."""
    if len(call.inputs) > BIAS:
        channels = (
            weight.shape[0]
            if not call.op.startswith("aten.conv_transpose")
            else weight.shape[1] * int(call.arguments["groups"])
        )
        return call.run(source, weight, source.new_zeros(channels))
    return call.run(source, weight)


def rules() -> dict[str, AbstractRule]:
    """Operation to rule."""
    table: dict[str, AbstractRule] = {}
    for axes in (1, 2, 3):
        table[f"aten.conv{axes}d.default"] = ConvolutionRule(axes)
        table[f"aten.conv{axes}d.padding"] = ConvolutionRule(axes)
    table["aten.conv_transpose1d.default"] = ConvolutionRule(1, transposed=True)
    table["aten.conv_transpose2d.input"] = ConvolutionRule(2, transposed=True)
    table["aten.conv_transpose3d.input"] = ConvolutionRule(3, transposed=True)
    return table
