"""Find what torch has one kernel for in a recording: the projections of layer normalisation and softmax.

Rules write them out entry by entry, which is five passes over memory; torch's own backward kernels make one of it. Each match
replaces its last instruction by the kernel; what nobody else reads then falls away (`disthess.sweep.fuse.without_dead`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, final

import torch
from torch import Tensor

from disthess.sweep.record import Instruction, Layout, Recording, Var

aten = torch.ops.aten


def with_kernels(recording: Recording) -> Recording:
    """The recording with every match replaced."""
    finder = _Finder(recording)
    return dataclasses.replace(recording, instructions=tuple(finder.replaced(it) for it in recording.instructions))


@final
class _Finder:
    """Matches against the instructions that made an instruction's arguments."""

    def __init__(self, recording: Recording) -> None:
        self._layouts = recording.layouts
        self._made = {
            index: instruction
            for instruction in recording.instructions
            for index in instruction.outputs
            if index is not None and recording.layouts[index].pure
        }

    def replaced(self, instruction: Instruction) -> Instruction:
        """The kernel that does the same, or the instruction itself."""
        if instruction.name != "aten.mul.Tensor" or not isinstance(instruction.args[0], Tensor):
            return instruction
        return self._softmax(instruction) or self._layer_norm(instruction) or instruction

    def _softmax(self, instruction: Instruction) -> Instruction | None:
        """``p (u - sum(p u))`` along the last axis."""
        level, inner = instruction.args
        difference = self._by(inner, "aten.sub.Tensor")
        summed = None if difference is None else self._by(difference.args[1], "aten.sum.dim_IntList")
        product = None if summed is None else self._by(summed.args[0], "aten.mul.Tensor")
        if difference is None or summed is None or product is None or not _along_last(summed):
            return None
        stack = difference.args[0]
        if product.args[0] is not level or product.args[1] != stack or not isinstance(stack, Var):
            return None
        layout = self._layouts[stack.index]
        if not _stacks(layout, level) or layout.dtype != level.dtype:
            return None
        whole = level.expand(layout.shape).contiguous()
        return dataclasses.replace(
            instruction, op=aten._softmax_backward_data.default, args=(stack, whole, -1, layout.dtype)
        )

    def _layer_norm(self, instruction: Instruction) -> Instruction | None:
        """``r (u - mean(u) - n mean(n u))`` along the last axis."""
        scale, inner = instruction.args
        difference = self._by(inner, "aten.sub.Tensor")
        centred = None if difference is None else self._by(difference.args[0], "aten.sub.Tensor")
        shifted = None if difference is None else self._by(difference.args[1], "aten.mul.Tensor")
        if centred is None or shifted is None:
            return None
        stack, normal = centred.args[0], shifted.args[0]
        level, along = self._by(centred.args[1], "aten.mean.dim"), self._by(shifted.args[1], "aten.mean.dim")
        product = None if along is None else self._by(along.args[0], "aten.mul.Tensor")
        if level is None or along is None or product is None or not (_along_last(level) and _along_last(along)):
            return None
        if level.args[0] != stack or product.args[0] is not normal or product.args[1] != stack:
            return None
        if not isinstance(stack, Var) or not isinstance(normal, Tensor):
            return None
        layout = self._layouts[stack.index]
        if not _stacks(layout, normal) or layout.dtype != normal.dtype or scale.shape != (*normal.shape[:-1], 1):
            return None
        # The kernel normalises by itself: an input of mean 0 whose product with the scale is the normalised one.
        given = (normal / scale).expand(layout.shape).contiguous()
        scales = scale.expand(*layout.shape[:-1], 1).contiguous()
        args = (stack, given, [layout.shape[-1]], torch.zeros_like(scales), scales, None, None, [True, False, False])
        outputs = (*instruction.outputs, None, None)
        return Instruction(aten.native_layer_norm_backward.default, args, (), outputs, many=True)

    def _by(self, value: Any, name: str) -> Instruction | None:
        made = self._made.get(value.index) if isinstance(value, Var) else None
        return made if made is not None and made.name == name and not made.kwargs else None


def _along_last(instruction: Instruction) -> bool:
    return len(instruction.args) == 3 and list(instruction.args[1]) == [-1] and bool(instruction.args[2])


def _stacks(layout: Layout, value: Tensor) -> bool:
    return layout.contiguous and layout.shape[1:] == tuple(value.shape) and value.ndim > 0
