"""Sums, products and quotients of two values that may broadcast.

With ``f = g(a, b)`` entry by entry, partial derivatives ``g_a``, ``g_b``, ``g_aa``, ``g_ab``, ``g_bb`` are tensors or plain
numbers; a stack is aligned to the output's axes, multiplied, and summed back over broadcast axes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from disthess.graph.ir import BatchAxis
from disthess.rules.base import AbstractRule, Call, Slot, Stack, Stacks
from disthess.rules.shape import align, sum_to

Factor = Tensor | float
"""A derivative: a tensor that broadcasts to the output, or a number."""


@dataclass(frozen=True, slots=True)
class Partials:
    """Derivatives of one call by its operands ``a`` and ``b``; 0.0 where they vanish."""

    a: Factor
    b: Factor
    aa: Factor = 0.0
    ab: Factor = 0.0
    bb: Factor = 0.0


@final
class BinaryRule(AbstractRule):
    """An operation on two operands, entry by entry.

    Args:
        partials: From a call to its derivatives.
        names: Schema names of the operands.
    """

    __slots__ = ("_names", "_partials")

    def __init__(self, partials: Callable[[Call], Partials], names: tuple[str, str] = ("self", "other")) -> None:
        self._partials = partials
        self._names = names

    @override
    def tangent(self, call: Call, tangents: Stacks) -> Stack:
        partials = self._partials(call)
        total: Tensor | None = None
        for slot, which in self._operands(call):
            factor = (partials.a, partials.b)[which]
            if slot in tangents:
                term = _times(align(tangents[slot], call.output.ndim), factor)
                total = term if total is None else total + term
        if total is None:
            raise ValueError("a tangent needs at least one slot")
        return total.expand(-1, *call.output.shape)

    @override
    def cotangent(
        self, call: Call, cotangent: Stack | None, tangents: Stacks, wanted: tuple[int, ...]
    ) -> dict[int, Stack]:
        found: dict[int, Stack] = {}
        for slot, total in self._whole(call, cotangent, tangents, wanted):
            part = sum_to(total, call.inputs[slot].shape)
            found[slot] = part if slot not in found else found[slot] + part
        return found

    @override
    def cotangent_per_sample(self, call: Call, cotangent: Stack | None, tangents: Stacks, slot: int) -> Stack | None:
        if call.batch is None:
            return None
        rows: Stack | None = None
        for _, total in self._whole(call, cotangent, tangents, (slot,)):
            part = _sum_samples(total, call.inputs[slot].shape, call.batch, call.samples)
            rows = part if rows is None else rows + part
        return rows

    @override
    def keeps_apart(self, call: Call, slot: int, axis: int) -> int | None:
        place = axis + call.output.ndim - call.inputs[slot].ndim
        return place if call.output.shape[place] == call.inputs[slot].shape[axis] else None

    @override
    def takes_rows_for_samples(self, call: Call, axis: int) -> bool:
        shared = [value for value, batch in zip(call.inputs, call.batch_inputs, strict=True) if batch is None]
        return all(align(value[None], call.output.ndim).shape[1 + axis] == 1 for value in shared)

    def _whole(
        self, call: Call, cotangent: Stack | None, tangents: Stacks, wanted: tuple[int, ...]
    ) -> list[tuple[int, Stack]]:
        """(slot, ``[K, *output]``) before the sum over broadcast axes."""
        partials = self._partials(call)
        rows = ((partials.a, partials.aa, partials.ab), (partials.b, partials.ab, partials.bb))
        operands = self._operands(call)
        found = []
        for slot, which in operands:
            if slot not in wanted:
                continue
            first, by_a, by_b = rows[which]
            terms = [] if cotangent is None or _is_zero(first) else [_times(cotangent, first)]
            for other, place in operands:
                second = (by_a, by_b)[place]
                if other in tangents and not _is_zero(second):
                    terms.append(_times(align(tangents[other], call.output.ndim), _scaled(call.delta, second)))
            if terms:
                total = terms[0]
                for term in terms[1:]:
                    total = total + term
                found.append((slot, total.expand(-1, *call.output.shape)))
        return found

    def _operands(self, call: Call) -> list[tuple[int, int]]:
        """(slot, 0 for a or 1 for b) of the operands that are tensors."""
        found = []
        for place, name in enumerate(self._names):
            value = call.arguments.get(name)
            if isinstance(value, Slot):
                found.append((value.index, place))
        return found


def _times(stack: Stack, factor: Factor) -> Stack:
    return stack if isinstance(factor, float) and factor == 1.0 else stack * factor


def _scaled(delta: Tensor, factor: Factor) -> Tensor:
    return delta if isinstance(factor, float) and factor == 1.0 else delta * factor


def _is_zero(factor: Factor) -> bool:
    return isinstance(factor, float) and factor == 0.0


def _sum_samples(stack: Stack, shape: tuple[int, ...], axis: BatchAxis, samples: int) -> Stack:
    """Sum over broadcast axes within each sample: ``[K, n, *shape]`` from ``[K, *output]``, for a value without batch axis.

    The batch axis is a broadcast axis of such a value (of size one, or absent): it is replaced by the sample's own rows.
    """
    spread = stack.unflatten(axis.dim + 1, (axis.outer, samples, axis.inner))
    ordered = spread.movedim(axis.dim + 2, 1).flatten(axis.dim + 2, axis.dim + 3)
    flat = ordered.flatten(0, 1)
    return sum_to(flat, shape).reshape(stack.shape[0], samples, *shape)


def _operand(call: Call, name: str) -> Factor:
    value = call.arguments[name]
    return call.inputs[value.index] if isinstance(value, Slot) else float(value)


def _alpha(call: Call) -> float:
    return float(call.arguments.get("alpha", 1))


def _add(call: Call) -> Partials:
    return Partials(1.0, _alpha(call))


def _sub(call: Call) -> Partials:
    return Partials(1.0, -_alpha(call))


def _rsub(call: Call) -> Partials:
    return Partials(-_alpha(call), 1.0)


def _mul(call: Call) -> Partials:
    return Partials(_operand(call, "other"), _operand(call, "self"), ab=1.0)


def _div(call: Call) -> Partials:
    inverse = 1.0 / _operand(call, "other")
    top = _operand(call, "self")
    return Partials(inverse, -top * inverse**2, ab=-(inverse**2), bb=2 * top * inverse**3)


def _mul_scalar(call: Call) -> Partials:
    return Partials(_operand(call, "other"), 0.0)


def _div_scalar(call: Call) -> Partials:
    return Partials(1.0 / float(call.arguments["other"]), 0.0)


def _choice(call: Call, first: Callable[[Tensor, Tensor], Tensor]) -> Partials:
    a, b = call.inputs
    return Partials(_share(first(a, b), a == b, a.dtype), _share(first(b, a), a == b, a.dtype))


def _share(chosen: Tensor, tie: Tensor, dtype: torch.dtype) -> Tensor:
    """1 where chosen, one half at a tie, as torch divides it."""
    return chosen.to(dtype) + 0.5 * tie.to(dtype)


def _maximum(call: Call) -> Partials:
    return _choice(call, torch.gt)


def _minimum(call: Call) -> Partials:
    return _choice(call, torch.lt)


def _pow_tensor(call: Call) -> Partials:
    a, b = _operand(call, "self"), _operand(call, "exponent")
    value = call.output
    base = a if isinstance(a, Tensor) else torch.full_like(value, a)
    power = b if isinstance(b, Tensor) else torch.full_like(value, b)
    # At a base of 0 and a positive exponent the power and its logarithms go to 0 together.
    log = torch.where((base == 0) & (power > 0), 0.0, torch.log(base))
    mixed = torch.where((base == 0) & (power > 1), 0.0, base ** (power - 1) * (1 + power * log))
    # Where the factor vanishes so does the product, also at a base of 0 where the power is infinite.
    slope = torch.where(power == 0, 0.0, power * base ** (power - 1))
    bend = torch.where((power == 0) | (power == 1), 0.0, power * (power - 1) * base ** (power - 2))
    return Partials(slope, value * log, aa=bend, ab=mixed, bb=value * log * log)


def rules() -> dict[str, AbstractRule]:
    """Operation to rule."""
    return {
        "aten.add.Tensor": BinaryRule(_add),
        "aten.add.Scalar": BinaryRule(_add),
        "aten.sub.Tensor": BinaryRule(_sub),
        "aten.sub.Scalar": BinaryRule(_sub),
        "aten.rsub.Tensor": BinaryRule(_rsub),
        "aten.rsub.Scalar": BinaryRule(_rsub),
        "aten.mul.Tensor": BinaryRule(_mul),
        "aten.mul.Scalar": BinaryRule(_mul_scalar),
        "aten.div.Tensor": BinaryRule(_div),
        "aten.div.Scalar": BinaryRule(_div_scalar),
        "aten.maximum.default": BinaryRule(_maximum),
        "aten.minimum.default": BinaryRule(_minimum),
        "aten.pow.Tensor_Tensor": BinaryRule(_pow_tensor, ("self", "exponent")),
        "aten.pow.Scalar": BinaryRule(_pow_tensor, ("self", "exponent")),
    }
