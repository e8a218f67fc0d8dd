"""Pieces of values along an axis, and values joined along one."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from disthess.rules.base import AbstractRule, Call, Stack, Stacks


@final
class PickRule(AbstractRule):
    """A contiguous or strided piece along one axis: ``select``, ``slice``, ``narrow``, ``split``, ``chunk``, ``unbind``.

    Args:
        take: From a call and a tensor with ``lead`` more axes in front to its piece (a view).
    """

    __slots__ = ("_take",)

    def __init__(self, take: Callable[[Call, Tensor, int], Tensor]) -> None:
        self._take = take

    @override
    def tangent(self, call: Call, tangents: Stacks) -> Stack:
        return self._take(call, tangents[0], 1)

    @override
    def cotangent(
        self, call: Call, cotangent: Stack | None, tangents: Stacks, wanted: tuple[int, ...]
    ) -> dict[int, Stack]:
        if cotangent is None:
            return {}
        whole = cotangent.new_zeros(cotangent.shape[0], *call.inputs[0].shape)
        self._take(call, whole, 1).copy_(cotangent)
        return {0: whole}

    @override
    def keeps_apart(self, call: Call, slot: int, axis: int) -> int | None:
        ndim, cut = call.inputs[0].ndim, _axis(call, 0)
        if axis != cut:
            return axis - (axis > cut) * (ndim - call.output.ndim)
        numbers = torch.arange(call.inputs[0].shape[axis])
        shape = [-1 if place == axis else 1 for place in range(ndim)]
        taken = self._take(call, numbers.reshape(shape).expand(call.inputs[0].shape), 0)
        # Only a leading part leaves places where they are.
        whole = taken.ndim == ndim and torch.equal(
            taken, numbers[: taken.shape[axis]].reshape(shape).expand(taken.shape)
        )
        return axis if whole else None


@final
class JoinRule(AbstractRule):
    """``cat`` and ``stack`` along one axis."""

    __slots__ = ("_new_axis",)

    def __init__(self, new_axis: bool) -> None:
        self._new_axis = new_axis

    @override
    def tangent(self, call: Call, tangents: Stacks) -> Stack:
        some = next(iter(tangents.values()))
        axis = self._axis(call)
        whole = some.new_zeros(some.shape[0], *call.output.shape)
        for slot, start, size in self._places(call, axis):
            if slot in tangents:
                piece = whole.select(axis + 1, start) if self._new_axis else whole.narrow(axis + 1, start, size)
                piece.copy_(tangents[slot])
        return whole

    @override
    def cotangent(
        self, call: Call, cotangent: Stack | None, tangents: Stacks, wanted: tuple[int, ...]
    ) -> dict[int, Stack]:
        if cotangent is None:
            return {}
        axis = self._axis(call)
        found: dict[int, Stack] = {}
        for slot, start, size in self._places(call, axis):
            if slot in wanted:
                found[slot] = (
                    cotangent.select(axis + 1, start) if self._new_axis else cotangent.narrow(axis + 1, start, size)
                )
        return found

    def _axis(self, call: Call) -> int:
        return int(call.arguments["dim"]) % call.output.ndim

    def _places(self, call: Call, axis: int) -> list[tuple[int, int, int]]:
        places, start = [], 0
        for slot in call.arguments["tensors"]:
            value = call.inputs[slot.index]
            if value.ndim == 1 and value.numel() == 0 and call.output.ndim > 1:
                continue
            size = 1 if self._new_axis else value.shape[axis]
            places.append((slot.index, start, size))
            start += size
        return places


def _axis(call: Call, lead: int) -> int:
    return int(call.arguments["dim"]) % call.inputs[0].ndim + lead


def _select(call: Call, value: Tensor, lead: int) -> Tensor:
    return value.select(_axis(call, lead), int(call.arguments["index"]))


def _slice(call: Call, value: Tensor, lead: int) -> Tensor:
    axis = _axis(call, lead)
    size = value.shape[axis]
    span = slice(call.arguments["start"], call.arguments["end"], call.arguments["step"]).indices(size)
    return value[(slice(None),) * axis + (slice(*span),)]


def _narrow(call: Call, value: Tensor, lead: int) -> Tensor:
    return value.narrow(_axis(call, lead), int(call.arguments["start"]), int(call.arguments["length"]))


def _piece(call: Call, value: Tensor, lead: int) -> Tensor:
    """The output of ``split``, ``chunk`` or ``unbind`` that the call is, found by running it on positions."""
    axis = _axis(call, lead)
    number = torch.arange(value.shape[axis], device=value.device)
    shape = [1] * call.inputs[0].ndim
    shape[axis - lead] = -1
    picked = call.run(number.reshape(shape).expand(call.inputs[0].shape))
    if picked.ndim < call.inputs[0].ndim:
        return value.select(axis, int(picked.reshape(-1)[0]))
    first = int(picked.reshape(-1)[0]) if picked.numel() else 0
    return value.narrow(axis, first, picked.shape[axis - lead])


def rules() -> dict[str, AbstractRule]:
    """Operation to rule."""
    return {
        "aten.select.int": PickRule(_select),
        "aten.slice.Tensor": PickRule(_slice),
        "aten.narrow.default": PickRule(_narrow),
        "aten.split.Tensor": PickRule(_piece),
        "aten.split_with_sizes.default": PickRule(_piece),
        "aten.chunk.default": PickRule(_piece),
        "aten.unbind.int": PickRule(_piece),
        "aten.cat.default": JoinRule(new_axis=False),
        "aten.concat.default": JoinRule(new_axis=False),
        "aten.stack.default": JoinRule(new_axis=True),
    }
