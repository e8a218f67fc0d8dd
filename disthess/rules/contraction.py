"""Products of two tensors: bilinear, so that S couples one operand with the other and is nothing but another product.

For ``f = B(a, b)``: ``f' = B(a', b) + B(a, b')``; to a: ``B(., b)^T f'' + B(., b')^T delta``; to b likewise.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from disthess.graph.batch import rows_by_sample
from disthess.rules.base import AbstractRule, Call, Slot, Stack, Stacks
from disthess.rules.generic import GenericRule
from disthess.rules.shape import align, sum_to


@final
class MatmulRule(AbstractRule):
    """``matmul``, ``mm``, ``bmm``, and ``addmm``, ``baddbmm`` with what they add; operands of two axes or more.

    Args:
        left: Schema name of the left operand.
        right: Schema name of the right one.
        added: Schema name of what is added, or None.
    """

    __slots__ = ("_added", "_generic", "_left", "_right")

    def __init__(self, left: str, right: str, added: str | None = None) -> None:
        self._left = left
        self._right = right
        self._added = added
        self._generic = GenericRule()

    @override
    def tangent(self, call: Call, tangents: Stacks) -> Stack:
        a, b, added = self._slots(call)
        if min(call.inputs[a].ndim, call.inputs[b].ndim) < 2:
            return self._generic.tangent(call, tangents)
        ndim = call.output.ndim
        total: Tensor | None = None
        if a in tangents:
            total = self._scaled(call, torch.matmul(align(tangents[a], ndim), call.inputs[b]))
        if b in tangents:
            term = self._scaled(call, torch.matmul(call.inputs[a], align(tangents[b], ndim)))
            total = term if total is None else total + term
        if added is not None and added in tangents:
            term = align(tangents[added], ndim) * self._beta(call)
            total = term if total is None else total + term
        if total is None:
            raise ValueError("a tangent needs at least one slot")
        return total.expand(-1, *call.output.shape)

    @override
    def cotangent(
        self, call: Call, cotangent: Stack | None, tangents: Stacks, wanted: tuple[int, ...]
    ) -> dict[int, Stack]:
        a, b, added = self._slots(call)
        if min(call.inputs[a].ndim, call.inputs[b].ndim) < 2:
            return self._generic.cotangent(call, cotangent, tangents, wanted)
        found: dict[int, Stack] = {}
        if a in wanted:
            self._put(found, a, call, self._to_left(call, cotangent, call.inputs[b], tangents.get(b)))
        if b in wanted:
            self._put(found, b, call, self._to_right(call, cotangent, call.inputs[a], tangents.get(a)))
        if added is not None and added in wanted and cotangent is not None:
            part = sum_to(cotangent * self._beta(call), call.inputs[added].shape)
            found[added] = found[added] + part if added in found else part
        return found

    @override
    def cotangent_per_sample(self, call: Call, cotangent: Stack | None, tangents: Stacks, slot: int) -> Stack | None:
        a, b, added = self._slots(call)
        plain = slot == b and slot not in (a, added) and call.inputs[b].ndim == 2 and call.batch_inputs[a] is not None
        if not plain or call.inputs[a].ndim < 2 or call.batch is None or call.batch.dim == call.output.ndim - 1:
            return None
        n, scale = call.samples, self._scale(call)
        rows = rows_by_sample(call.inputs[a], call.batch_inputs[a], n)
        total: Tensor | None = None
        if cotangent is not None:
            bent = rows_by_sample(cotangent, call.batch, n, lead=1)
            total = torch.matmul(rows.transpose(-1, -2), bent) * scale
        if a in tangents:
            moved = rows_by_sample(tangents[a], call.batch_inputs[a], n, lead=1)
            delta = rows_by_sample(call.delta, call.batch, n)
            term = torch.matmul(moved.transpose(-1, -2), delta) * scale
            total = term if total is None else total + term
        return total

    def _slots(self, call: Call) -> tuple[int, int, int | None]:
        left, right = call.arguments[self._left], call.arguments[self._right]
        added = call.arguments[self._added] if self._added is not None else None
        return left.index, right.index, added.index if isinstance(added, Slot) else None

    def _to_left(self, call: Call, cotangent: Stack | None, right: Tensor, moved: Stack | None) -> list[Stack]:
        terms = [] if cotangent is None else [torch.matmul(cotangent, right.transpose(-1, -2))]
        if moved is not None:
            terms.append(torch.matmul(call.delta, align(moved, call.output.ndim).transpose(-1, -2)))
        return terms

    def _to_right(self, call: Call, cotangent: Stack | None, left: Tensor, moved: Stack | None) -> list[Stack]:
        terms = [] if cotangent is None else [torch.matmul(left.transpose(-1, -2), cotangent)]
        if moved is not None:
            terms.append(torch.matmul(align(moved, call.output.ndim).transpose(-1, -2), call.delta))
        return terms

    def _put(self, found: dict[int, Stack], slot: int, call: Call, terms: list[Stack]) -> None:
        if terms:
            total = terms[0] if len(terms) == 1 else terms[0] + terms[1]
            part = sum_to(self._scaled(call, total), call.inputs[slot].shape)
            found[slot] = found[slot] + part if slot in found else part

    def _scaled(self, call: Call, stack: Stack) -> Stack:
        scale = self._scale(call)
        return stack if scale == 1 else stack * scale

    def _scale(self, call: Call) -> float:
        return float(call.arguments.get("alpha", 1)) if self._added is not None else 1.0

    def _beta(self, call: Call) -> float:
        return float(call.arguments.get("beta", 1))


@final
class EinsumRule(AbstractRule):
    """``einsum`` of any number of operands: linear in each, so every derivative is a sum of einsums of the same equation."""

    __slots__ = ("_generic",)

    def __init__(self) -> None:
        self._generic = GenericRule()

    @override
    def tangent(self, call: Call, tangents: Stacks) -> Stack:
        return self._generic.tangent(call, tangents)

    @override
    def cotangent(
        self, call: Call, cotangent: Stack | None, tangents: Stacks, wanted: tuple[int, ...]
    ) -> dict[int, Stack]:
        return self._generic.cotangent(call, cotangent, tangents, wanted)


def rules() -> dict[str, AbstractRule]:
    """Operation to rule."""
    return {
        "aten.matmul.default": MatmulRule("self", "other"),
        "aten.mm.default": MatmulRule("self", "mat2"),
        "aten.bmm.default": MatmulRule("self", "mat2"),
        "aten.addmm.default": MatmulRule("mat1", "mat2", "self"),
        "aten.baddbmm.default": MatmulRule("batch1", "batch2", "self"),
        "aten.mv.default": GenericRule(),
        "aten.dot.default": GenericRule(),
        "aten.einsum.default": EinsumRule(),
    }
