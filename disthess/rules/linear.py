"""The dense layer ``f = x W^T + b``: the operation that most of the work goes through.

Stacks are multiplied as one tall matrix. With ``x`` ``[..., i]``, ``W`` ``[o, i]``:

* tangent    ``x' W^T + x W'^T + b'``
* to ``x``   ``f'' W + delta W'``
* to ``W``   ``sum_rows f''^T x + delta^T x'``
* to ``b``   ``sum_rows f''``

A unit vector of W moves one output by one input: no product is needed for it.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from disthess.graph.batch import rows_by_sample
from disthess.rules.base import AbstractRule, Call, Stack, Stacks, ThinRows, Units
from disthess.rules.columns import add_columns
from disthess.rules.outer import add_batch, outers_per_sample
from disthess.rules.products import product

INPUT, WEIGHT, BIAS = 0, 1, 2

NARROW = 16
"""Inputs below which a weight's products are made transposed: so few columns take MKL up to five times as long as so few rows."""


@final
class LinearRule(AbstractRule):
    """``aten.linear``; slots are x, W and, if given, b."""

    __slots__ = ()

    @override
    def tangent(self, call: Call, tangents: Stacks) -> Stack:
        total: Tensor | None = None
        if INPUT in tangents:
            total = product(tangents[INPUT], call.inputs[WEIGHT].T)
        if WEIGHT in tangents:
            rows = call.inputs[INPUT].reshape(-1, call.inputs[INPUT].shape[-1])
            term = torch.matmul(rows, tangents[WEIGHT].transpose(1, 2)).reshape(-1, *call.output.shape)
            total = term if total is None else total + term
        if BIAS in tangents:
            shift = tangents[BIAS].reshape(-1, *[1] * (call.output.ndim - 1), call.output.shape[-1])
            total = shift.expand(-1, *call.output.shape) if total is None else total + shift
        if total is None:
            raise ValueError("a tangent needs at least one slot")
        return total

    @override
    def cotangent(
        self, call: Call, cotangent: Stack | None, tangents: Stacks, wanted: tuple[int, ...]
    ) -> dict[int, Stack]:
        found: dict[int, Stack] = {}
        if INPUT in wanted:
            terms = [] if cotangent is None else [product(cotangent, call.inputs[WEIGHT])]
            if WEIGHT in tangents:
                rows = call.delta.reshape(-1, call.delta.shape[-1])
                terms.append(torch.matmul(rows, tangents[WEIGHT]).reshape(-1, *call.inputs[INPUT].shape))
            _put(found, INPUT, terms)
        if WEIGHT in wanted:
            total = None if cotangent is None else _outer(_flat(cotangent), _rows(call.inputs[INPUT]), None)
            if INPUT in tangents:
                total = _outer(_rows(call.delta), _flat(tangents[INPUT]), total)
            if total is not None:
                found[WEIGHT] = total
        if BIAS in wanted and cotangent is not None:
            found[BIAS] = _flat(cotangent).sum(1)
        return found

    @override
    def add_units(self, call: Call, slot: int, units: Units, total: Stack | None) -> Stack:
        if slot != WEIGHT:
            return super().add_units(call, slot, units, total)
        # W' has its one at [o, j]: z'[:, o] = x[:, j].
        outputs, inputs = units.places
        moved = _rows(call.inputs[INPUT])[:, inputs].T
        return add_columns(total, call.output, call.output.ndim - 1, outputs, moved)

    @override
    def add_units_back(
        self, call: Call, slot: int, units: Units, wanted: tuple[int, ...], found: dict[int, Stack]
    ) -> None:
        if slot != WEIGHT:
            super().add_units_back(call, slot, units, wanted, found)
        elif INPUT in wanted:
            outputs, inputs = units.places
            moved = _rows(call.delta)[:, outputs].T
            before = call.inputs[INPUT]
            found[INPUT] = add_columns(found.get(INPUT), before, before.ndim - 1, inputs, moved)

    @override
    def cotangent_per_sample(self, call: Call, cotangent: Stack | None, tangents: Stacks, slot: int) -> Stack | None:
        if slot == BIAS:
            return None if cotangent is None else rows_by_sample(cotangent, call.batch, call.samples, lead=1).sum(2)
        pairs = self.row_pairs(call, cotangent, tangents, slot)
        return outers_per_sample(pairs) if pairs else None

    @override
    def row_pairs(
        self, call: Call, cotangent: Stack | None, tangents: Stacks, slot: int
    ) -> list[tuple[Tensor, Tensor]] | None:
        if slot != WEIGHT:
            return None
        n, before, pairs = call.samples, call.batch_inputs[INPUT], []
        if cotangent is not None:
            bent = rows_by_sample(cotangent, call.batch, n, lead=1)
            pairs.append((bent, rows_by_sample(call.inputs[INPUT], before, n)))
        if INPUT in tangents:
            moved = rows_by_sample(tangents[INPUT], before, n, lead=1)
            pairs.append((rows_by_sample(call.delta, call.batch, n), moved))
        return pairs

    @override
    def thin_rows(self, call: Call, cotangent: Stack | None, tangents: Stacks, slot: int) -> ThinRows | None:
        if slot != WEIGHT or not set(tangents) <= {INPUT}:
            return None
        n, batch, before = call.samples, call.batch, call.batch_inputs[INPUT]
        inputs = rows_by_sample(call.inputs[INPUT], before, n)
        if inputs.shape[1] != 1:
            return None
        bent = None if cotangent is None else rows_by_sample(cotangent, batch, n, lead=1)[:, :, 0]
        moved = None if INPUT not in tangents else rows_by_sample(tangents[INPUT], before, n, lead=1)[:, :, 0]
        return ThinRows(bent, inputs[:, 0], rows_by_sample(call.delta, batch, n)[:, 0], moved)

    @override
    def keeps_apart(self, call: Call, slot: int, axis: int) -> int | None:
        return axis if slot == INPUT and axis < call.inputs[INPUT].ndim - 1 else None

    @override
    def takes_rows_for_samples(self, call: Call, axis: int) -> bool:
        return axis < call.output.ndim - 1

    @override
    def source_rows(self, call: Call, slot: int) -> Tensor | None:
        if slot == WEIGHT:
            return rows_by_sample(call.inputs[INPUT], call.batch_inputs[INPUT], call.samples)
        if slot == BIAS:
            rows = rows_by_sample(call.output, call.batch, call.samples)
            return rows.new_ones(*rows.shape[:2], 1)
        return None


def _put(found: dict[int, Stack], slot: int, terms: list[Tensor]) -> None:
    if terms:
        found[slot] = terms[0] if len(terms) == 1 else terms[0] + terms[1]


def _rows(value: Tensor) -> Tensor:
    """``[rows, features]``."""
    return value.reshape(-1, value.shape[-1])


def _flat(stack: Stack) -> Tensor:
    """``[K, rows, features]``."""
    return stack.reshape(stack.shape[0], -1, stack.shape[-1])


def _outer(left: Tensor, right: Tensor, total: Tensor | None) -> Tensor:
    """``sum_rows left[(k,) row, o] right[(k,) row, i]``, added to ``total`` in place if given: ``[K, o, i]``."""
    if right.shape[-1] < min(left.shape[-1], NARROW):
        return _outer(right, left, None if total is None else total.transpose(1, 2)).transpose(1, 2)
    count = left.shape[0] if left.ndim == 3 else right.shape[0]
    # Strides, not copies: the product takes a transposed operand as it is, and one that all tangents share.
    left, right = left.expand(count, *left.shape[-2:]), right.expand(count, *right.shape[-2:])
    return add_batch(left.transpose(1, 2), right, total)
