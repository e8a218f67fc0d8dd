"""Pooling: averages are linear; a maximum is linear once the entry it takes is known (torch takes the first of a tie)."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from disthess.rules.base import AbstractRule, Call, Stack, Stacks
from disthess.rules.generic import LinearMapRule


@final
class MaxPoolRule(AbstractRule):
    """``max_pool1d`` and ``max_pool2d``.

    Args:
        axes: Number of spatial axes.
    """

    __slots__ = ("_axes",)

    def __init__(self, axes: int) -> None:
        self._axes = axes

    @override
    def tangent(self, call: Call, tangents: Stacks) -> Stack:
        flat = tangents[0].flatten(-self._axes)
        index = self._index(call).flatten(-self._axes)
        return flat.gather(-1, index.expand(flat.shape[0], *index.shape)).reshape(flat.shape[0], *call.output.shape)

    @override
    def cotangent(
        self, call: Call, cotangent: Stack | None, tangents: Stacks, wanted: tuple[int, ...]
    ) -> dict[int, Stack]:
        if cotangent is None:
            return {}
        flat = cotangent.flatten(-self._axes)
        index = self._index(call).flatten(-self._axes)
        shape = call.inputs[0].shape
        whole = cotangent.new_zeros(cotangent.shape[0], *shape[: -self._axes], shape[-self._axes :].numel())
        whole.scatter_add_(-1, index.expand(flat.shape[0], *index.shape), flat)
        return {0: whole.reshape(cotangent.shape[0], *shape)}

    @override
    def keeps_apart(self, call: Call, slot: int, axis: int) -> int | None:
        return axis if axis < call.inputs[0].ndim - self._axes else None

    def _index(self, call: Call) -> Tensor:
        """Position of the entry taken, in the flattened spatial axes."""
        return call.once("index", lambda: self._found(call))

    def _found(self, call: Call) -> Tensor:
        a = call.arguments
        pool = F.max_pool1d if self._axes == 1 else F.max_pool2d
        with torch.no_grad():
            return pool(
                call.inputs[0],
                a["kernel_size"],
                a["stride"] or None,
                a["padding"],
                a["dilation"],
                bool(a["ceil_mode"]),
                return_indices=True,
            )[1]


def rules() -> dict[str, AbstractRule]:
    """Operation to rule."""
    return {
        "aten.max_pool1d.default": MaxPoolRule(1),
        "aten.max_pool2d.default": MaxPoolRule(2),
        "aten.avg_pool1d.default": LinearMapRule(axes=1),
        "aten.avg_pool2d.default": LinearMapRule(axes=2),
        "aten.avg_pool3d.default": LinearMapRule(axes=3),
        "aten.adaptive_avg_pool1d.default": LinearMapRule(axes=1),
        "aten.adaptive_avg_pool2d.default": LinearMapRule(axes=2),
        "aten._adaptive_avg_pool2d.default": LinearMapRule(axes=2),
    }
