"""Convolutions: bilinear in input and weight, linear in the bias.

With ``f = C(x, w) + b``: ``f' = C(x', w) + C(x, w') + b'``; to x: ``C(., w)^T f'' + C(., w')^T delta``; to w likewise; to b the sum
of ``f''``. K tangents of a value that has a batch axis are K times as many samples of one convolution; K of one that has none are
K times as many channels of it. Grouped convolutions, asymmetric padding and inputs without batch axis go by autograd.

Place by place it is a dense layer: ``f[n, s, o] = sum_j w[o, j] x[n, s, j]`` with j a channel and a tap of the kernel, and x what
they see from place s. So rows of a weight sample by sample are ``sum_s f''[n, s, o] x[n, s, j] + delta[n, s, o] x'[n, s, j]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from typing_extensions import override

from disthess.graph.batch import rows_by_sample
from disthess.rules.base import AbstractRule, Call, Stack, Stacks, Units
from disthess.rules.columns import add_columns
from disthess.rules.generic import GenericRule
from disthess.rules.outer import outers_per_sample

INPUT, WEIGHT, BIAS = 0, 1, 2


@dataclass(frozen=True, slots=True)
class _Geometry:
    """How the kernel moves.

    Attributes:
        stride: Per axis.
        padding: Per axis, the same on both sides.
        dilation: Per axis.
        extra: Output padding of a transposed convolution, per axis.
        transposed: Whether it is one.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    extra: tuple[int, ...]
    transposed: bool

    def run(self, source: Tensor, weight: Tensor) -> Tensor:
        """``C(source, weight)``."""
        return torch.ops.aten.convolution(
            source, weight, None, self.stride, self.padding, self.dilation, self.transposed, self.extra, 1
        )

    def windows(self, inputs: Tensor, taps: Sequence[int], places: Sequence[int]) -> Tensor:
        """What the kernel's taps see, a view: ``[channels, *taps, n, *places]`` of inputs ``[n, channels, ...]``."""
        padded = torch.nn.functional.pad(inputs, [size for size in reversed(self.padding) for _ in range(2)])
        samples, channels, *steps = padded.stride()
        moves = [step * gap for step, gap in zip(steps, self.dilation, strict=True)]
        jumps = [step * gap for step, gap in zip(steps, self.stride, strict=True)]
        shape = (padded.shape[1], *taps, padded.shape[0], *places)
        return padded.as_strided(shape, (channels, *moves, samples, *jumps))

    def to_input(self, slope: Tensor, source: Tensor, weight: Tensor) -> Tensor:
        """``C(., weight)^T slope``; only the shape of ``source`` counts."""
        return self._back(slope, source, weight, 0)

    def to_weight(self, slope: Tensor, source: Tensor, weight: Tensor) -> Tensor:
        """``C(source, .)^T slope``; only the shape of ``weight`` counts."""
        return self._back(slope, source, weight, 1)

    def _back(self, slope: Tensor, source: Tensor, weight: Tensor, which: int) -> Tensor:
        found = torch.ops.aten.convolution_backward(
            slope, source, weight, None, self.stride, self.padding, self.dilation, self.transposed, self.extra, 1,
            [which == 0, which == 1, False],
        )  # fmt: skip
        return found[which]


@final
class ConvolutionRule(AbstractRule):
    """``conv1d``, ``conv2d``, ``conv3d`` and transposed ones; slots are input, weight and, if given, bias.

    Args:
        axes: Number of spatial axes.
        transposed: Whether it is a transposed convolution.
    """

    __slots__ = ("_axes", "_generic", "_inner", "_outer", "_transposed")

    def __init__(self, axes: int, transposed: bool = False) -> None:
        self._axes = axes
        self._transposed = transposed
        self._generic = GenericRule()
        # Axes of the weight that run over channels of the input and of the output.
        self._inner, self._outer = (0, 1) if transposed else (1, 0)

    @override
    def tangent(self, call: Call, tangents: Stacks) -> Stack:
        geometry = self._geometry(call)
        if geometry is None:
            return self._generic.tangent(call, tangents)
        x, weight = call.inputs[INPUT], call.inputs[WEIGHT]
        total: Tensor | None = None
        if INPUT in tangents:
            stack = tangents[INPUT]
            total = geometry.run(stack.reshape(-1, *stack.shape[2:]), weight).unflatten(0, (stack.shape[0], -1))
        if WEIGHT in tangents:
            stack = tangents[WEIGHT]
            term = _unfolded(geometry.run(x, _folded(stack, self._outer)), 1, len(stack))
            total = term if total is None else total + term
        if BIAS in tangents:
            shift = tangents[BIAS].reshape(-1, 1, call.output.shape[1], *[1] * self._axes)
            total = shift.expand(-1, *call.output.shape) if total is None else total + shift
        if total is None:
            raise ValueError("a tangent needs at least one slot")
        return total

    @override
    def cotangent(
        self, call: Call, cotangent: Stack | None, tangents: Stacks, wanted: tuple[int, ...]
    ) -> dict[int, Stack]:
        geometry = self._geometry(call)
        if geometry is None:
            return self._by_autograd(call, cotangent, tangents, wanted)
        found: dict[int, Stack] = {}
        if INPUT in wanted:
            _put(found, INPUT, self._to_input(geometry, call, cotangent, tangents.get(WEIGHT)))
        if WEIGHT in wanted:
            _put(found, WEIGHT, self._to_weight(geometry, call, cotangent, tangents.get(INPUT)))
        if BIAS in wanted and cotangent is not None:
            found[BIAS] = self._to_bias(call, cotangent)
        return found

    @override
    def add_units(self, call: Call, slot: int, units: Units, total: Stack | None) -> Stack:
        geometry = self._geometry(call)
        if slot != WEIGHT or geometry is None or self._transposed:
            return super().add_units(call, slot, units, total)
        # W' has its one at [o, c, tap]: that output channel moves by an input channel, shifted.
        outputs, *inner = units.places
        moved = geometry.windows(call.inputs[INPUT], call.inputs[WEIGHT].shape[2:], call.output.shape[2:])[tuple(inner)]
        return add_columns(total, call.output, 1, outputs, moved)

    @override
    def cotangent_per_sample(self, call: Call, cotangent: Stack | None, tangents: Stacks, slot: int) -> Stack | None:
        if slot == BIAS and cotangent is not None and call.batch is not None and call.batch.rows_per_sample == 1:
            return cotangent.flatten(3).sum(3) if cotangent.ndim > 3 else cotangent
        pairs = self.row_pairs(call, cotangent, tangents, slot)
        return outers_per_sample(pairs).unflatten(3, call.inputs[WEIGHT].shape[1:]) if pairs else None

    @override
    def row_pairs(
        self, call: Call, cotangent: Stack | None, tangents: Stacks, slot: int
    ) -> list[tuple[Tensor, Tensor]] | None:
        inputs = self.source_rows(call, slot)
        if inputs is None:
            return None
        pairs = [] if cotangent is None else [(self.source_outputs(call, cotangent), inputs)]
        if INPUT in tangents:
            pairs.append((self.source_outputs(call, call.delta[None])[0], self.source_inputs(call, tangents[INPUT])))
        return pairs

    @override
    def source_rows(self, call: Call, slot: int) -> Tensor | None:
        if slot != WEIGHT or self._transposed or self._geometry(call) is None:
            return None
        if any(axis is not None and axis.dim for axis in (call.batch, call.batch_inputs[INPUT])):
            return None
        return self.source_inputs(call, call.inputs[INPUT][None])[0].contiguous()

    @property
    @override
    def source_axis(self) -> int:
        return 1

    @override
    def source_inputs(self, call: Call, stack: Stack) -> Stack:
        """What the kernel sees from every place of a sample, ``[K, n, R, channels taps]``; zeros outside."""
        geometry = self._geometry(call)
        if geometry is None:
            raise ValueError("a convolution that goes by autograd has no rows of inputs")
        taps = call.inputs[WEIGHT].shape[2:]
        windows = geometry.windows(stack.flatten(0, 1), taps, call.output.shape[2:])
        by_place = windows.reshape(-1, *windows.shape[1 + len(taps) :]).movedim(0, -1)
        apart = by_place.unflatten(0, (len(stack), -1))
        return rows_by_sample(apart, call.batch, call.samples, lead=1)

    def _to_input(self, geometry: _Geometry, call: Call, cotangent: Stack | None, moved: Stack | None) -> list[Stack]:
        x, weight = call.inputs[INPUT], call.inputs[WEIGHT]
        terms = []
        if cotangent is not None:
            flat = cotangent.reshape(-1, *cotangent.shape[2:])
            like = x.new_empty(()).expand(flat.shape[0], *x.shape[1:])
            terms.append(geometry.to_input(flat, like, weight).unflatten(0, (len(cotangent), -1)))
        if moved is not None:
            wide = x.new_empty(()).expand(x.shape[0], len(moved) * x.shape[1], *x.shape[2:])
            terms.append(_unfolded(geometry.to_input(call.delta, wide, _folded(moved, self._inner)), 1, len(moved)))
        return terms

    def _to_weight(self, geometry: _Geometry, call: Call, cotangent: Stack | None, moved: Stack | None) -> list[Stack]:
        x, weight = call.inputs[INPUT], call.inputs[WEIGHT]
        terms = []
        if cotangent is not None:
            like = _wide(weight, self._outer, len(cotangent))
            terms.append(_unfolded(geometry.to_weight(_folded(cotangent, 1), x, like), self._outer, len(cotangent)))
        if moved is not None:
            like = _wide(weight, self._inner, len(moved))
            terms.append(_unfolded(geometry.to_weight(call.delta, _folded(moved, 1), like), self._inner, len(moved)))
        return terms

    def _to_bias(self, call: Call, cotangent: Stack) -> Stack:
        # First over samples: one sum over all these axes at once reads memory in small jumps, eight times slower.
        by_place = cotangent.sum(1) if call.inputs[INPUT].ndim == self._axes + 2 else cotangent
        return by_place.flatten(2).sum(2)

    def _by_autograd(
        self, call: Call, cotangent: Stack | None, tangents: Stacks, wanted: tuple[int, ...]
    ) -> dict[int, Stack]:
        found: dict[int, Stack] = {}
        if BIAS in wanted and cotangent is not None:
            found[BIAS] = self._to_bias(call, cotangent)
        held = {slot: stack for slot, stack in tangents.items() if slot != BIAS}
        rest = tuple(slot for slot in wanted if slot != BIAS)
        if rest and (cotangent is not None or held):
            found.update(self._generic.cotangent(call, cotangent, held, rest))
        return found

    def _geometry(self, call: Call) -> _Geometry | None:
        """None where channels are grouped, padding is not symmetric, or there is no batch axis."""
        arguments = call.arguments
        if int(arguments["groups"]) != 1 or call.inputs[INPUT].ndim != self._axes + 2:
            return None
        stride, dilation = self._per_axis(arguments, "stride"), self._per_axis(arguments, "dilation")
        kernel = call.inputs[WEIGHT].shape[2:]
        padding = arguments["padding"]
        if isinstance(padding, str):
            reach = [step * (size - 1) if padding == "same" else 0 for step, size in zip(dilation, kernel, strict=True)]
            if any(size % 2 for size in reach):
                return None
            around = tuple(size // 2 for size in reach)
        else:
            around = self._per_axis(arguments, "padding")
        extra = self._per_axis(arguments, "output_padding") if self._transposed else (0,) * self._axes
        return _Geometry(stride, around, dilation, extra, self._transposed)

    def _per_axis(self, arguments: Mapping[str, Any], name: str) -> tuple[int, ...]:
        given = arguments[name]
        values = (int(given),) if isinstance(given, int) else tuple(int(value) for value in given)
        return values * self._axes if len(values) == 1 else values


def _put(found: dict[int, Stack], slot: int, terms: list[Stack]) -> None:
    if terms:
        found[slot] = terms[0] if len(terms) == 1 else terms[0] + terms[1]


def _folded(stack: Stack, axis: int) -> Tensor:
    """``[K, a, b, ...]`` with tangents and the given axis in one: ``[K a, b, ...]`` for axis 0, ``[a, K b, ...]`` for axis 1."""
    return stack.movedim(0, axis).flatten(axis, axis + 1)


def _unfolded(value: Tensor, axis: int, count: int) -> Stack:
    """Undo `_folded`."""
    return value.unflatten(axis, (count, -1)).movedim(axis, 0)


def _wide(weight: Tensor, axis: int, count: int) -> Tensor:
    """Of the shape of K weights side by side along an axis; takes no memory."""
    shape = list(weight.shape)
    shape[axis] *= count
    return weight.new_empty(()).expand(shape)


def rules() -> dict[str, AbstractRule]:
    """Operation to rule."""
    table: dict[str, AbstractRule] = {}
    for axes in (1, 2, 3):
        table[f"aten.conv{axes}d.default"] = ConvolutionRule(axes)
        table[f"aten.conv{axes}d.padding"] = ConvolutionRule(axes)
    table["aten.conv_transpose1d.default"] = ConvolutionRule(1, transposed=True)
    table["aten.conv_transpose2d.input"] = ConvolutionRule(2, transposed=True)
    table["aten.conv_transpose3d.input"] = ConvolutionRule(3, transposed=True)
    return table
