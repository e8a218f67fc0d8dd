"""Operations that move entries about: S is zero, and D is the same move on a stack."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, final

from torch import Tensor
from typing_extensions import override

from disthess.rules.base import AbstractRule, Call, Slot, Stack, Stacks
from disthess.rules.generic import LinearMapRule

_RESHAPES = (
    "view.default", "reshape.default", "_unsafe_view.default", "flatten.using_ints", "unflatten.int", "squeeze.default",
    "squeeze.dim", "squeeze.dims", "unsqueeze.default", "view_copy.default", "_reshape_alias.default",
)  # fmt: skip
_COPIES = (
    "clone.default",
    "alias.default",
    "contiguous.default",
    "lift_fresh_copy.default",
    "to.dtype",
    "_to_copy.default",
)
_LINEAR = (
    "slice_scatter.default", "select_scatter.default", "flip.default", "roll.default", "tril.default",
    "triu.default", "repeat.default", "cumsum.default", "diagonal.default", "diag_embed.default", "unfold.default",
    "im2col.default", "pixel_shuffle.default", "constant_pad_nd.default", "pad.default",
    "reflection_pad1d.default", "reflection_pad2d.default", "replication_pad1d.default",
    "replication_pad2d.default", "repeat_interleave.self_int", "repeat_interleave.self_Tensor",
    "upsample_nearest2d.vec", "upsample_bilinear2d.vec", "trace.default", "diag.default",
    "pixel_unshuffle.default", "rot90.default", "real.default",
)  # fmt: skip
_STILL = (
    "detach.default", "zeros_like.default", "ones_like.default", "full_like.default", "empty_like.default",
    "new_zeros.default", "new_ones.default", "new_full.default", "sign.default", "floor.default", "ceil.default",
    "round.default", "trunc.default",
)  # fmt: skip


@final
class ReshapeRule(AbstractRule):
    """The entries in the same order under another shape."""

    __slots__ = ()

    @override
    def tangent(self, call: Call, tangents: Stacks) -> Stack:
        stack = tangents[0]
        return stack.reshape(stack.shape[0], *call.output.shape)

    @override
    def cotangent(
        self, call: Call, cotangent: Stack | None, tangents: Stacks, wanted: tuple[int, ...]
    ) -> dict[int, Stack]:
        return {} if cotangent is None else {0: cotangent.reshape(cotangent.shape[0], *call.inputs[0].shape)}

    @override
    def keeps_apart(self, call: Call, slot: int, axis: int) -> int | None:
        before, after = call.inputs[0].shape, call.output.shape
        same = (place for place, size in enumerate(after) if size == before[axis])
        return next((place for place in same if math.prod(after[:place]) == math.prod(before[:axis])), None)

    @override
    def entry_multiply_adds(self, shapes: tuple[tuple[int, ...], ...], shape: tuple[int, ...]) -> int:
        return 0


@final
class PermuteRule(AbstractRule):
    """Axes in another order.

    Args:
        order: From a call to the order of axes.
    """

    __slots__ = ("_order",)

    def __init__(self, order: Callable[[Call], tuple[int, ...]]) -> None:
        self._order = order

    @override
    def tangent(self, call: Call, tangents: Stacks) -> Stack:
        return tangents[0].permute(0, *(axis + 1 for axis in self._order(call)))

    @override
    def cotangent(
        self, call: Call, cotangent: Stack | None, tangents: Stacks, wanted: tuple[int, ...]
    ) -> dict[int, Stack]:
        if cotangent is None:
            return {}
        order = self._order(call)
        back = sorted(range(len(order)), key=order.__getitem__)
        return {0: cotangent.permute(0, *(axis + 1 for axis in back))}

    @override
    def keeps_apart(self, call: Call, slot: int, axis: int) -> int | None:
        return self._order(call).index(axis)

    @override
    def entry_multiply_adds(self, shapes: tuple[tuple[int, ...], ...], shape: tuple[int, ...]) -> int:
        return 0


@final
class ExpandRule(AbstractRule):
    """Repetition along axes of size one; back, the sum over them."""

    __slots__ = ()

    @override
    def tangent(self, call: Call, tangents: Stacks) -> Stack:
        stack = tangents[0]
        missing = call.output.ndim - call.inputs[0].ndim
        aligned = stack.reshape(stack.shape[0], *[1] * missing, *stack.shape[1:])
        return aligned.expand(-1, *call.output.shape)

    @override
    def cotangent(
        self, call: Call, cotangent: Stack | None, tangents: Stacks, wanted: tuple[int, ...]
    ) -> dict[int, Stack]:
        return {} if cotangent is None else {0: sum_to(cotangent, call.inputs[0].shape)}

    @override
    def keeps_apart(self, call: Call, slot: int, axis: int) -> int | None:
        place = axis + call.output.ndim - call.inputs[0].ndim
        return place if call.output.shape[place] == call.inputs[0].shape[axis] else None


@final
class CopyRule(AbstractRule):
    """The identity."""

    __slots__ = ()

    @override
    def tangent(self, call: Call, tangents: Stacks) -> Stack:
        return tangents[0].to(call.output.dtype)

    @override
    def cotangent(
        self, call: Call, cotangent: Stack | None, tangents: Stacks, wanted: tuple[int, ...]
    ) -> dict[int, Stack]:
        return {} if cotangent is None else {0: cotangent.to(call.inputs[0].dtype)}

    @override
    def keeps_apart(self, call: Call, slot: int, axis: int) -> int | None:
        return axis

    @override
    def entry_multiply_adds(self, shapes: tuple[tuple[int, ...], ...], shape: tuple[int, ...]) -> int:
        return 0


@final
class StillRule(AbstractRule):
    """Locally constant: its derivative is zero, as torch's is."""

    __slots__ = ()

    @override
    def tangent(self, call: Call, tangents: Stacks) -> Stack:
        some = next(iter(tangents.values()))
        return call.delta.new_zeros(some.shape[0], *call.output.shape)

    @override
    def cotangent(
        self, call: Call, cotangent: Stack | None, tangents: Stacks, wanted: tuple[int, ...]
    ) -> dict[int, Stack]:
        return {}


@final
class WhereRule(AbstractRule):
    """``where(condition, a, b)`` and ``masked_fill(a, mask, value)``: entries of one or the other."""

    __slots__ = ("_branches",)

    def __init__(self, branches: Callable[[Call], tuple[tuple[int, Tensor], ...]]) -> None:
        self._branches = branches

    @override
    def tangent(self, call: Call, tangents: Stacks) -> Stack:
        total: Tensor | None = None
        for slot, mask in self._branches(call):
            if slot in tangents:
                stack = align(tangents[slot], call.output.ndim).masked_fill(~mask, 0).expand(-1, *call.output.shape)
                total = stack if total is None else total + stack
        if total is None:
            raise ValueError("a tangent needs at least one slot")
        return total

    @override
    def cotangent(
        self, call: Call, cotangent: Stack | None, tangents: Stacks, wanted: tuple[int, ...]
    ) -> dict[int, Stack]:
        if cotangent is None:
            return {}
        found: dict[int, Stack] = {}
        for slot, mask in self._branches(call):
            if slot in wanted:
                part = sum_to(cotangent.masked_fill(~mask, 0), call.inputs[slot].shape)
                found[slot] = part if slot not in found else found[slot] + part
        return found

    @override
    def keeps_apart(self, call: Call, slot: int, axis: int) -> int | None:
        return axis if call.inputs[slot].shape == call.output.shape else None


def align(stack: Stack, ndim: int) -> Stack:
    """Insert axes of size one after K, so that a stack of a smaller value broadcasts against one of ``ndim`` axes."""
    missing = ndim - (stack.ndim - 1)
    return stack if missing <= 0 else stack.reshape(stack.shape[0], *[1] * missing, *stack.shape[1:])


def sum_to(stack: Stack, shape: tuple[int, ...]) -> Stack:
    """Sum a stack over the axes along which a value of ``shape`` was broadcast: ``[K, *shape]``."""
    extra = stack.ndim - 1 - len(shape)
    if extra:
        stack = stack.flatten(1, extra).sum(1) if extra > 0 else stack
    axes = [axis + 1 for axis, size in enumerate(shape) if size == 1 and stack.shape[axis + 1] != 1]
    return stack.sum(axes, keepdim=True) if axes else stack


def _permuted(call: Call) -> tuple[int, ...]:
    return tuple(int(axis) % call.inputs[0].ndim for axis in call.arguments["dims"])


def _swapped(call: Call) -> tuple[int, ...]:
    ndim = call.inputs[0].ndim
    order = list(range(ndim))
    first, second = int(call.arguments["dim0"]) % ndim, int(call.arguments["dim1"]) % ndim
    order[first], order[second] = order[second], order[first]
    return tuple(order)


def _transposed(call: Call) -> tuple[int, ...]:
    return (1, 0) if call.inputs[0].ndim == 2 else tuple(range(call.inputs[0].ndim))


def _moved(call: Call) -> tuple[int, ...]:
    return tuple(_move_order(call.inputs[0].ndim, call.arguments["source"], call.arguments["destination"]))


def _move_order(ndim: int, source: Any, destination: Any) -> list[int]:
    sources = [int(s) % ndim for s in (source if isinstance(source, tuple) else (source,))]
    places = [int(d) % ndim for d in (destination if isinstance(destination, tuple) else (destination,))]
    rest = iter(axis for axis in range(ndim) if axis not in sources)
    at = dict(zip(places, sources, strict=True))
    return [at[place] if place in at else next(rest) for place in range(ndim)]


def _where_branches(call: Call) -> tuple[tuple[int, Tensor], ...]:
    condition = call.inputs[0]
    found = []
    for name, mask in (("self", condition), ("other", ~condition)):
        value = call.arguments[name]
        if isinstance(value, Slot):
            found.append((value.index, mask))
    return tuple(found)


def _fill_branches(call: Call) -> tuple[tuple[int, Tensor], ...]:
    mask = call.inputs[1]
    value = call.arguments["value"]
    found = [(0, ~mask)]
    if isinstance(value, Slot):
        found.append((value.index, mask))
    return tuple(found)


def rules() -> dict[str, AbstractRule]:
    """Operation to rule."""
    table: dict[str, AbstractRule] = {f"aten.{name}": ReshapeRule() for name in _RESHAPES}
    table.update({f"aten.{name}": CopyRule() for name in _COPIES})
    table.update({f"aten.{name}": LinearMapRule() for name in _LINEAR})
    table.update({f"aten.{name}": StillRule() for name in _STILL})
    table.update(
        {
            "aten.permute.default": PermuteRule(_permuted),
            "aten.transpose.int": PermuteRule(_swapped),
            "aten.swapaxes.default": LinearMapRule(),
            "aten.t.default": PermuteRule(_transposed),
            "aten.numpy_T.default": LinearMapRule(),
            "aten.mT.default": LinearMapRule(),
            "aten.movedim.int": PermuteRule(_moved),
            "aten.movedim.intlist": PermuteRule(_moved),
            "aten.expand.default": ExpandRule(),
            "aten.expand_as.default": ExpandRule(),
            "aten.broadcast_to.default": ExpandRule(),
            "aten.where.self": WhereRule(_where_branches),
            "aten.where.ScalarOther": WhereRule(_where_branches),
            "aten.where.ScalarSelf": WhereRule(_where_branches),
            "aten.masked_fill.Scalar": WhereRule(_fill_branches),
            "aten.masked_fill.Tensor": WhereRule(_fill_branches),
        }
    )
    return table
