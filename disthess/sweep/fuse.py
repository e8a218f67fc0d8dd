"""Make a recording shorter: shared constants, no work done twice, products that add up in place, values overwritten when dead.

Every pass takes a recording to one that computes the same up to rounding. Values whose storage is written to by the recorded
function itself (not ``pure``) are left as they are, in their order.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any, final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from disthess.sweep.kernels import with_kernels
from disthess.sweep.record import Instruction, Layout, Recording, Var

aten = torch.ops.aten

VIEWS = frozenset({"aten.view.default", "aten._unsafe_view.default"})
IN_PLACE = {
    "aten.add.Tensor": aten.add_.Tensor,
    "aten.sub.Tensor": aten.sub_.Tensor,
    "aten.mul.Tensor": aten.mul_.Tensor,
    "aten.addcmul.default": aten.addcmul_.default,
    "aten.addmm.default": aten.addmm_.default,
    "aten.baddbmm.default": aten.baddbmm_.default,
    "aten.neg.default": aten.neg_.default,
}
COMMUTE = frozenset({"aten.add.Tensor", "aten.mul.Tensor"})


def fuse(recording: Recording) -> Recording:
    """All passes."""
    merged = with_kernels(without_dead(without_repeats(shared_constants(recording))))
    return overwriting(without_dead(_Rewriter(without_dead(merged)).run()))


def shared_constants(recording: Recording) -> Recording:
    """One tensor for all constants of equal entries: rules ask for a point's statistics more than once."""
    known: dict[tuple[Any, ...], list[Tensor]] = {}
    seen: dict[int, Tensor] = {}

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in seen:
            group = known.setdefault((leaf.shape, leaf.stride(), leaf.dtype), [])
            seen[id(leaf)] = next((other for other in group if torch.equal(other, leaf)), leaf)
            if seen[id(leaf)] is leaf:
                group.append(leaf)
        return seen[id(leaf)]

    return dataclasses.replace(recording, instructions=tuple(_mapped(it, one) for it in recording.instructions))


def without_repeats(recording: Recording) -> Recording:
    """The same operation of the same arguments is done once."""
    layouts = dict(recording.layouts)
    found: dict[tuple[Any, ...], Instruction] = {}
    renamed: dict[int, int] = {}
    moved: dict[int, int] = {}
    kept = []

    def rename(leaf: Any) -> Any:
        return Var(renamed.get(leaf.index, leaf.index)) if isinstance(leaf, Var) else leaf

    for recorded in recording.instructions:
        instruction = _mapped(recorded, rename)
        outputs = [index for index in instruction.outputs if index is not None]
        if all(layouts[index].pure for index in (*instruction.reads(), *outputs)):
            earlier = found.setdefault(_key(instruction), instruction)
            if earlier is not instruction:
                for old, new in zip(instruction.outputs, earlier.outputs, strict=True):
                    if old is not None and new is not None:
                        renamed[old] = new
                        moved[layouts[old].storage] = layouts[new].storage
                continue
        kept.append(instruction)
    layouts = {
        index: dataclasses.replace(layout, storage=moved.get(layout.storage, layout.storage))
        for index, layout in layouts.items()
    }
    results = tuple(rename(result) for result in recording.results)
    return Recording(recording.inputs, tuple(kept), results, layouts)


def without_dead(recording: Recording) -> Recording:
    """Only what a result, or something written to, needs."""
    needed = {result.index for result in recording.results if isinstance(result, Var)}
    kept = []
    for instruction in reversed(recording.instructions):
        outputs = [index for index in instruction.outputs if index is not None]
        if any(index in needed or not recording.layouts[index].pure for index in outputs):
            kept.append(instruction)
            needed.update(instruction.reads())
    return dataclasses.replace(recording, instructions=tuple(reversed(kept)))


def overwriting(recording: Recording) -> Recording:
    """Entry-wise operations and sums with products write into an argument that nobody reads afterwards."""
    layouts = recording.layouts
    storage = {index: layout.storage for index, layout in layouts.items()}
    owner = {number: number for number in storage.values()}
    last: dict[int, int] = {}
    for place, instruction in enumerate(recording.instructions):
        for index in instruction.reads():
            last[storage[index]] = place
    held = {storage[result.index] for result in recording.results if isinstance(result, Var)}
    held |= {storage[index] for index in range(recording.inputs)}

    def dead(value: Any, place: int, layout: Layout, others: Iterable[Any]) -> bool:
        if not isinstance(value, Var) or not layouts[value.index].pure:
            return False
        mine, here = layouts[value.index], owner[storage[value.index]]
        if (mine.shape, mine.stride, mine.dtype) != (layout.shape, layout.stride, layout.dtype):
            return False
        if any(isinstance(other, Var) and owner[storage[other.index]] == here for other in others):
            return False
        return here not in held and last[here] <= place

    instructions = []
    for place, instruction in enumerate(recording.instructions):
        if instruction.name in IN_PLACE and instruction.outputs[0] is not None:
            index = instruction.outputs[0]
            for args in _orders(instruction):
                if layouts[index].pure and dead(args[0], place, layouts[index], args[1:]):
                    instruction = dataclasses.replace(instruction, op=IN_PLACE[instruction.name], args=args)
                    new, old = storage[index], owner[storage[args[0].index]]
                    last[old] = last.get(new, place)
                    owner[new] = old
                    if new in held:
                        held.add(old)
                    break
        instructions.append(instruction)
    return dataclasses.replace(recording, instructions=tuple(instructions))


@final
class _Rewriter:
    """Sums with products become multiply-adds: ``addcmul``, ``addmm``, ``baddbmm``; transposes are not copied for products."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._layouts = dict(recording.layouts)
        self._made: dict[int, Instruction] = {}
        self._done: list[Instruction] = []
        reads = [index for instruction in recording.instructions for index in instruction.reads()]
        results = [result.index for result in recording.results if isinstance(result, Var)]
        self._uses = Counter([*reads, *results])

    def run(self) -> Recording:
        """The recording with fewer passes over memory."""
        for instruction in self._recording.instructions:
            if not self._rewritten(instruction):
                self._emit(instruction)
        return dataclasses.replace(self._recording, instructions=tuple(self._done), layouts=self._layouts)

    def _emit(self, instruction: Instruction) -> None:
        self._done.append(instruction)
        for index in instruction.outputs:
            if index is not None:
                self._made[index] = instruction

    def _rewritten(self, instruction: Instruction) -> bool:
        index = instruction.outputs[0]
        if index is None or not all(self._layouts[it].pure for it in (index, *instruction.reads())):
            return False
        if instruction.name == "aten.mm.default":
            return self._batched(instruction, index)
        if instruction.kwargs or instruction.name not in ("aten.add.Tensor", "aten.sub.Tensor"):
            return False
        first, second = instruction.args
        if instruction.name == "aten.sub.Tensor":
            return self._multiplied(index, first, second, -1)
        pairs = ((first, second), (second, first))
        if any(self._accumulated(index, total, term) for total, term in pairs):
            return True
        return any(self._multiplied(index, total, term, 1) for total, term in pairs)

    def _multiplied(self, index: int, total: Any, term: Any, sign: int) -> bool:
        """``total + sign b c``."""
        made = self._sole(term, frozenset({"aten.mul.Tensor"}))
        if made is None or not isinstance(total, (Var, Tensor)):
            return False
        if any(self._dtype(it) != self._layouts[index].dtype for it in (total, *made.args)):
            return False
        kwargs = () if sign == 1 else (("value", sign),)
        self._emit(Instruction(aten.addcmul.default, (total, *made.args), kwargs, (index,)))
        return True

    def _accumulated(self, index: int, total: Any, term: Any) -> bool:
        """``total + x y`` for matrix products, seen through changes of shape."""
        if not isinstance(total, Var):
            return False
        made, layout = self._sole(term, frozenset({"aten.mm.default", "aten.bmm.default"}), VIEWS), self._layouts[index]
        before = self._layouts[total.index]
        if made is None or not layout.contiguous or not before.contiguous or before.shape != layout.shape:
            return False
        whole = made.outputs[0]
        if whole is None or before.dtype != layout.dtype:
            return False
        shape = self._layouts[whole].shape
        seen = self._view(total, shape, before.storage)
        op = aten.addmm.default if made.name == "aten.mm.default" else aten.baddbmm.default
        out = self._new(dataclasses.replace(self._layouts[whole], storage=layout.storage))
        self._emit(Instruction(op, (seen, *made.args), (), (out,)))
        self._emit(Instruction(aten.view.default, (Var(out), list(layout.shape)), (), (index,)))
        return True

    def _batched(self, instruction: Instruction, index: int) -> bool:
        """``reshape(left^T) right`` of a stack as a product of stacks, which needs no copy of the transposed one."""
        left, right = instruction.args
        copied = self._sole(left, frozenset({"aten.clone.default"}), VIEWS)
        if copied is None or not isinstance(copied.args[0], Var) or not isinstance(right, Tensor):
            return False
        turned = self._layouts[copied.args[0].index]
        if len(turned.shape) != 3 or turned.stride[1] != 1 or self._layouts[left.index].shape[1] != turned.shape[2]:
            return False
        count, outputs, _ = turned.shape
        layout = self._layouts[index]
        shape = (count, outputs, layout.shape[1])
        stride = (outputs * layout.shape[1], layout.shape[1], 1)
        out = self._new(dataclasses.replace(layout, shape=shape, stride=stride))
        stack = right.expand(count, *right.shape)
        self._emit(Instruction(aten.bmm.default, (copied.args[0], stack), (), (out,)))
        self._emit(Instruction(aten.view.default, (Var(out), list(layout.shape)), (), (index,)))
        return True

    def _sole(self, value: Any, ops: frozenset[str], through: frozenset[str] = frozenset()) -> Instruction | None:
        """The instruction that made a value, if it is one of ``ops`` and nobody else reads it, also through views."""
        while isinstance(value, Var) and self._uses[value.index] == 1 and self._layouts[value.index].pure:
            made = self._made.get(value.index)
            if made is None:
                return None
            if made.name in ops:
                return made
            if made.name not in through:
                return None
            value = made.args[0]
        return None

    def _view(self, value: Var, shape: tuple[int, ...], storage: int) -> Var:
        before = self._layouts[value.index]
        stride, step = [], 1
        for size in reversed(shape):
            stride.append(step)
            step *= size
        seen = self._new(Layout(shape, tuple(reversed(stride)), storage, before.dtype))
        self._emit(Instruction(aten.view.default, (value, list(shape)), (), (seen,)))
        return Var(seen)

    def _new(self, layout: Layout) -> int:
        index = max(self._layouts) + 1
        self._layouts[index] = layout
        return index

    def _dtype(self, value: Any) -> torch.dtype | None:
        if isinstance(value, Var):
            return self._layouts[value.index].dtype
        return value.dtype if isinstance(value, Tensor) else None


def _orders(instruction: Instruction) -> tuple[tuple[Any, ...], ...]:
    if instruction.name in COMMUTE and not instruction.kwargs and isinstance(instruction.args[1], Var):
        return instruction.args, (instruction.args[1], instruction.args[0])
    return (instruction.args,)


def _mapped(instruction: Instruction, change: Any) -> Instruction:
    args, kwargs = pytree.tree_map(change, (instruction.args, dict(instruction.kwargs)))
    return dataclasses.replace(instruction, args=args, kwargs=tuple(kwargs.items()))


def _key(instruction: Instruction) -> tuple[Any, ...]:
    leaves, shape = pytree.tree_flatten((instruction.args, dict(instruction.kwargs)))
    named = tuple(("tensor", id(leaf)) if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves)
    return instruction.name, named, str(shape)
