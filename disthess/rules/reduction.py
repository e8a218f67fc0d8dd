"""Sums and means over axes: linear, and back an expansion."""

from __future__ import annotations

from typing import final

from torch import Tensor
from typing_extensions import override

from disthess.rules.base import AbstractRule, Call, Stack, Stacks


@final
class SumRule(AbstractRule):
    """``sum`` or ``mean`` over some axes or all.

    Args:
        mean: Whether to divide by the number of entries summed.
    """

    __slots__ = ("_mean",)

    def __init__(self, mean: bool) -> None:
        self._mean = mean

    @override
    def tangent(self, call: Call, tangents: Stacks) -> Stack:
        axes = tuple(axis + 1 for axis in _axes(call))
        total = tangents[0].sum(axes, keepdim=_keeps(call)) if axes else tangents[0]
        return total * self._scale(call)

    @override
    def cotangent(
        self, call: Call, cotangent: Stack | None, tangents: Stacks, wanted: tuple[int, ...]
    ) -> dict[int, Stack]:
        if cotangent is None:
            return {}
        spread: Tensor = cotangent * self._scale(call)
        if not _keeps(call):
            for axis in _axes(call):
                spread = spread.unsqueeze(axis + 1)
        return {0: spread.expand(-1, *call.inputs[0].shape)}

    @override
    def keeps_apart(self, call: Call, slot: int, axis: int) -> int | None:
        summed = _axes(call)
        if axis in summed:
            return None
        return axis if _keeps(call) else axis - sum(other < axis for other in summed)

    @override
    def entry_multiply_adds(self, shapes: tuple[tuple[int, ...], ...], shape: tuple[int, ...]) -> int:
        count = 1
        for size in shapes[0]:
            count *= size
        return count

    def _scale(self, call: Call) -> float:
        return call.output.numel() / call.inputs[0].numel() if self._mean and call.inputs[0].numel() else 1.0


def _axes(call: Call) -> tuple[int, ...]:
    ndim = call.inputs[0].ndim
    given = call.arguments.get("dim")
    if given is None or given == ():
        return tuple(range(ndim))
    listed = given if isinstance(given, tuple) else (given,)
    return tuple(sorted(int(axis) % ndim for axis in listed)) if ndim else ()


def _keeps(call: Call) -> bool:
    return bool(call.arguments.get("keepdim", False))


def rules() -> dict[str, AbstractRule]:
    """Operation to rule."""
    return {
        "aten.sum.default": SumRule(mean=False),
        "aten.sum.dim_IntList": SumRule(mean=False),
        "aten.mean.default": SumRule(mean=True),
        "aten.mean.dim": SumRule(mean=True),
    }
