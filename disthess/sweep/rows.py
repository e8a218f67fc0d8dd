"""Per-sample rows of target leaves, formed piece by piece, and multiplied by what a sink multiplies them by.

For units u of R tangents each, rows ``M[u, (r, n), :]`` and multipliers ``x[j, (r, n)]`` (or ``x[u, j, (r, n)]``) a sink adds
``sum_(r, n) x[j, (r, n)] M[u, (r, n), :]`` to its sums. Rows of a parameter that is used several times are added up over its uses
before they are multiplied: the products are what costs.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor
from typing_extensions import override

from disthess.planning.memory import CACHE_BYTES
from disthess.planning.source import OwnColumns
from disthess.rules.base import AbstractRule, Call, Stack
from disthess.rules.outer import Pairs, outers_per_sample
from disthess.rules.products import add_products
from disthess.sweep.buffers import Block
from disthess.sweep.frame import Frame
from disthess.sweep.rowwise import Rowwise
from disthess.sweep.wave import AbstractSink, per_sample_rows


@dataclass(frozen=True, slots=True)
class Targets:
    """Which leaves are targets, and the buffer key of each.

    Attributes:
        keys: Buffer key by leaf index.
        sizes: Number of entries by leaf index.
        shared: Leaves that add up in one place with others.
        own_key: Buffer key of the source's own block.
        own: Its columns that are wanted.
    """

    keys: Mapping[int, str]
    sizes: Mapping[int, int]
    shared: frozenset[int] = frozenset()
    own_key: str = ""
    own: OwnColumns = field(default_factory=OwnColumns)

    def block(self, leaf: int) -> Block:
        """Where a leaf's rows add up."""
        return Block(self.keys[leaf], self.sizes[leaf])


@dataclass(frozen=True, slots=True)
class _Kept:
    """What one use's rows are made of."""

    rule: AbstractRule
    call: Call
    slot: int
    cotangent: Stack | None
    tangents: Mapping[int, Stack]

    def pairs(self, stack: slice, skip: int = 0) -> Pairs:
        """Of some tangents, without the leading outputs of the leaf."""
        part = None if self.cotangent is None else self.cotangent[stack]
        parts = {key: value[stack] for key, value in self.tangents.items()}
        pairs = self.rule.row_pairs(self.call, part, parts, self.slot) or []
        return [(left[..., skip:], right) for left, right in pairs] if skip else pairs


class AbstractRowsSink(AbstractSink):
    """Multiplies per-sample rows and adds them to sums.

    Args:
        targets: The targets.
        multipliers: ``x``, ``[n, R, j]``, or ``[units, n, R, j]``.
        units: Their number: the stack is units x R tangents, unit by unit.
        rowwise: Where rows are taken for samples; the multipliers are then ``[n R, 1, j]``.
    """

    def __init__(self, targets: Targets, multipliers: Tensor, units: int, rowwise: Rowwise | None = None) -> None:
        self._targets = targets
        self._rowwise = rowwise
        self._samples, self._rows, self._width = multipliers.shape[-3:]
        self._multipliers = multipliers.transpose(-3, -1).flatten(-2).contiguous()
        self._units = units
        self._kept: dict[str, tuple[int, list[_Kept]]] = {}

    @abc.abstractmethod
    def _sums(self, leaf: int) -> Tensor:
        """What a leaf's products are added to in place, ``[units, j, entries]``."""

    @abc.abstractmethod
    def _without_rows(
        self, frame: Frame, index: int, call: Call, slot: int, cotangent: Stack | None, tangents: Mapping[int, Stack]
    ) -> bool:
        """Do without rows where there is a shorter way, and say whether there was."""

    @abc.abstractmethod
    def _left_out(self, units: slice) -> int:
        """Leading outputs whose columns are not wanted of the source's own block, for some units of the stack."""

    @property
    @override
    def per_sample(self) -> bool:
        return True

    @override
    def take(self, leaf: int, rows: Stack) -> None:
        self._add(leaf, slice(0, self._units), rows)

    @override
    def take_call(
        self, frame: Frame, index: int, call: Call, slot: int, cotangent: Stack | None, tangents: Mapping[int, Stack]
    ) -> None:
        leaf, rule = frame.slots(index)[slot], frame.rule(index)
        if self._rowwise is not None:
            tangents = {at: self._rowwise.tangent(index, call, at, stack) for at, stack in tangents.items()}
            cotangent = None if cotangent is None else self._rowwise.cotangent(index, call, cotangent)
            call = self._rowwise.call(index, call)
        kept = _Kept(rule, call, slot, cotangent, tangents)
        if leaf in self._targets.shared and kept.pairs(slice(0, 1)):
            self._kept.setdefault(self._targets.keys[leaf], (leaf, []))[1].append(kept)
            return
        if self._without_rows(frame, index, call, slot, cotangent, tangents):
            return
        for units, stack in self._pieces(self._targets.sizes[leaf]):
            part = None if cotangent is None else cotangent[stack]
            parts = {key: value[stack] for key, value in tangents.items()}
            self._add(leaf, units, self._formed(frame, index, call, slot, part, parts))

    @override
    def finish(self) -> None:
        for leaf, uses in self._kept.values():
            own = self._targets.keys[leaf] == self._targets.own_key
            for units, stack in self._pieces(self._targets.sizes[leaf]):
                skip = self._left_out(units) if own else 0
                self._add(leaf, units, outers_per_sample([pair for use in uses for pair in use.pairs(stack, skip)]))
        self._kept.clear()

    def _formed(
        self, frame: Frame, index: int, call: Call, slot: int, cotangent: Stack | None, tangents: Mapping[int, Stack]
    ) -> Stack:
        """``[K, n, *input]``, n R in place of n where rows are taken for samples."""
        if self._rowwise is None:
            return per_sample_rows(frame, index, call, slot, cotangent, tangents)
        rows = frame.rule(index).cotangent_per_sample(call, cotangent, tangents, slot)
        some = cotangent if cotangent is not None else next(iter(tangents.values()))
        return rows if rows is not None else some.new_zeros(len(some), call.samples, *call.inputs[slot].shape)

    def _pieces(self, size: int) -> Iterator[tuple[slice, slice]]:
        """Units, and their tangents, of which rows of so many entries fit the cache."""
        per_unit = self._rows * self._samples * size * self._multipliers.element_size()
        step = max(1, CACHE_BYTES // max(1, per_unit))
        for first in range(0, self._units, step):
            units = slice(first, min(first + step, self._units))
            yield units, slice(units.start * self._rows, units.stop * self._rows)

    def _add(self, leaf: int, units: slice, rows: Stack) -> None:
        """``sums[u, j, :] += sum_(r, n) x[j, (r, n)] rows[u, (r, n), :]``, of rows ``[K, n, *entries]``: the last of a leaf's."""
        count = units.stop - units.start
        each = rows.reshape(count, self._rows * self._samples, -1)
        sums = self._sums(leaf)[units]
        left = self._multipliers if self._multipliers.ndim == 2 else self._multipliers[units]
        add_products(sums[..., sums.shape[-1] - each.shape[-1] :], left, each)
