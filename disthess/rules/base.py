"""What a rule is: one operation's first and second derivatives, applied to stacks of tangents.

For a node ``f = g(x_0, x_1, ...)`` inside a scalar objective L, with cotangent ``delta = dL/df`` held fixed, write
``D_a = dg/dx_a`` and ``S_ab = sum_i delta_i d2 g_i / dx_a dx_b``. A rule gives, for K tangents at once,

* ``tangent``:    ``f' = sum_a D_a x_a'``
* ``cotangent``:  ``x_a'' = D_a^T f'' + sum_b S_ab x_b'``   (the tangent of ``dL/dx_a``)

Stacks carry the K tangents in a leading axis: a tangent of a value of shape ``[2, 3]`` is ``[K, 2, 3]``.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from disthess.graph.batch import rows_by_sample
from disthess.graph.ir import BatchAxis, Node

T = TypeVar("T")

Stack = Tensor
"""A tensor with a leading axis of K tangents."""

Stacks = Mapping[int, Tensor]
"""Stacks by slot; a missing slot is zero."""


@dataclass(frozen=True, slots=True)
class Units:
    """A stack of unit vectors of a value, without its zeros.

    Attributes:
        shape: Of the value.
        ones: Where each has its one, in flat order, ``[K]``.

    >>> [places.tolist() for places in Units((2, 3), torch.tensor([1, 2, 3])).places]
    [[0, 0, 1], [1, 2, 0]]
    """

    shape: tuple[int, ...]
    ones: Tensor

    def __len__(self) -> int:
        return len(self.ones)

    @property
    def places(self) -> tuple[Tensor, ...]:
        """Where each has its one: an index ``[K]`` per axis."""
        return tuple(torch.unravel_index(self.ones, self.shape))

    def dense(self, like: Tensor) -> Stack:
        """``[K, *shape]``, in the type of ``like``."""
        numbers = torch.arange(math.prod(self.shape), device=self.ones.device)
        return (self.ones[:, None] == numbers).to(like.dtype).reshape(len(self), *self.shape)


@dataclass(frozen=True, slots=True)
class Slot:
    """Stands for the i-th tensor argument inside ``Call.arguments``."""

    index: int


@dataclass(frozen=True, slots=True)
class Call:
    """One operation at its primal point, on one slice of samples.

    Attributes:
        op: ``aten.linear.default`` and so on.
        inputs: Its tensor arguments, in schema order (lists flattened): slot i is ``inputs[i]``.
        arguments: Every schema argument by name, defaults filled in, tensors replaced by `Slot` (lists by tuples of
            `Slot`).
        run: ``run(*inputs)`` recomputes the output, any tensors of the same shapes in place of ``inputs``.
        output: Its value.
        delta: ``dL/d output``, same shape as ``output``; zeros where L does not see it.
        batch: Batch axis of the output, or None.
        batch_inputs: Batch axis of each input, or None.
        samples: Number of samples n in this slice.
        memo: What rules have computed from this point; see `once`.
    """

    op: str
    inputs: tuple[Tensor, ...]
    arguments: Mapping[str, Any]
    run: Callable[..., Tensor]
    output: Tensor
    delta: Tensor
    batch: BatchAxis | None
    batch_inputs: tuple[BatchAxis | None, ...]
    samples: int
    memo: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What ``make`` gives, made when first asked for: what depends on the primal point alone is the same for every stack."""
        if name not in self.memo:
            self.memo[name] = make()
        found: T = self.memo[name]
        return found

    def slot(self, name: str) -> int | None:
        """Slot of a schema argument that is a single tensor, or None if it was not given."""
        value = self.arguments[name]
        return value.index if isinstance(value, Slot) else None


@dataclass(frozen=True, slots=True)
class ThinRows:
    """Rows ``[K, n, o, i]`` of a slot as outer products of vectors, ``bent[k, n] x[n] + delta[n] moved[k, n]``, not formed.

    Attributes:
        bent: ``[K, n, o]``, or None for zero.
        inputs: ``x``, ``[n, i]``.
        deltas: ``[n, o]``.
        moved: ``[K, n, i]``, or None for zero.
    """

    bent: Stack | None
    inputs: Tensor
    deltas: Tensor
    moved: Stack | None


class AbstractRule(abc.ABC):
    """One operation's derivatives. Leaves are final; values are frozen."""

    __slots__ = ()

    def objection(self, node: Node) -> str | None:
        """Why this node has no Hessian although its operation has a rule, and what to do; None if it has."""
        return None

    @abc.abstractmethod
    def tangent(self, call: Call, tangents: Stacks) -> Stack:
        """``sum_a D_a x_a'``: ``[K, *output]`` from ``[K, *input]`` of at least one slot."""

    @abc.abstractmethod
    def cotangent(
        self, call: Call, cotangent: Stack | None, tangents: Stacks, wanted: tuple[int, ...]
    ) -> dict[int, Stack]:
        """``D_a^T f'' + sum_b S_ab x_b'`` for each wanted slot a: ``[K, *input]``.

        Args:
            call: The primal point; S uses ``call.delta``.
            cotangent: ``f''``, ``[K, *output]``, or None for zero.
            tangents: ``x_b'``; empty to leave S out. ``cotangent`` and ``tangents`` are not both empty.
            wanted: Slots to return. A slot may be left out of the result if its cotangent is zero.
        """

    def add_units(self, call: Call, slot: int, units: Units, total: Stack | None) -> Stack:
        """``total + D_a x_a'`` where the tangents of a slot are unit vectors; ``total`` may be written over."""
        term = self.tangent(call, {slot: units.dense(call.inputs[slot])})
        return term if total is None else total + term

    def add_units_back(
        self, call: Call, slot: int, units: Units, wanted: tuple[int, ...], found: dict[int, Stack]
    ) -> None:
        """Add ``S_ab x_b'`` to the stacks of ``found``, where the tangents of slot b are unit vectors."""
        for other, term in self.cotangent(call, None, {slot: units.dense(call.inputs[slot])}, wanted).items():
            found[other] = found[other] + term if other in found else term

    def cotangent_per_sample(self, call: Call, cotangent: Stack | None, tangents: Stacks, slot: int) -> Stack | None:
        """As `cotangent` for one slot that has no batch axis, before the sum over samples: ``[K, n, *input]``.

        None means that the rule has no closed form; the caller then evaluates `cotangent` sample by sample.
        """
        return None

    def row_pairs(
        self, call: Call, cotangent: Stack | None, tangents: Stacks, slot: int
    ) -> list[tuple[Tensor, Tensor]] | None:
        """Rows of a slot as sums of outer products, not multiplied out: what `disthess.rules.outer` takes.

        Returns:
            Pairs of ``[(K,) n, r, o]`` and ``[(K,) n, r, i]``, one of each pair with K; the rows are ``[K, n, o, i]`` but for the
            slot's shape. None where they are no such sums.
        """
        return None

    def thin_rows(self, call: Call, cotangent: Stack | None, tangents: Stacks, slot: int) -> ThinRows | None:
        """What `cotangent_per_sample` would multiply out, where that is one outer product of vectors a sample; else None."""
        return None

    def source_rows(self, call: Call, slot: int) -> Tensor | None:
        """For a slot that enters as ``f[n, r, o] = sum_j w[o, j] x[n, r, j]``: the rows ``x``, ``[n, R, i]``.

        Then unit vectors of the output suffice for the panel of that slot (the output basis). None otherwise.
        """
        return None

    @property
    def source_axis(self) -> int:
        """Axis of the output that the o of `source_rows` runs over."""
        return -1

    @property
    def source_slot(self) -> int:
        """Slot of the input that `source_rows` are entries of."""
        return 0

    def source_inputs(self, call: Call, stack: Stack) -> Stack:
        """A stack at that input in the order of `source_rows`, entries as they are: ``[K, *input]`` to ``[K, n, R, i]``."""
        return rows_by_sample(stack, call.batch_inputs[self.source_slot], call.samples, lead=1)

    def source_outputs(self, call: Call, stack: Stack) -> Stack:
        """A stack at the output in the order of `source_rows`: ``[K, *output]`` to ``[K, n, R, o]``."""
        axis = self.source_axis
        last = stack.movedim(axis if axis < 0 else axis + 1, -1)
        return rows_by_sample(last, call.batch, call.samples, lead=1)

    def keeps_apart(self, call: Call, slot: int, axis: int) -> int | None:
        """Where places along an axis of an input end up, if none of them meets another; None if they may.

        Entries of the output at place c of the axis returned depend, of that input, on entries at place c of ``axis`` alone.
        """
        return None

    def takes_rows_for_samples(self, call: Call, axis: int) -> bool:
        """Whether the rules apply as they are where entries along an axis of the output are samples of their own.

        Then the arguments hold no sizes, what all samples share has no entries along that axis, and `cotangent_per_sample` has a
        closed form for every slot that has no batch axis: None stands for zero.
        """
        return False

    def entry_multiply_adds(self, shapes: tuple[tuple[int, ...], ...], shape: tuple[int, ...]) -> int:
        """Multiply-adds of applying D to one tangent that are done entry by entry, from input shapes and output shape.

        Matrix products are not among them: they are counted by what the rule does (`disthess.sweep.meter`). Default: one per
        entry of the output.
        """
        return math.prod(shape)
