"""Entries picked or placed by indices: linear in what they come from; back, rows are added where they came from."""

from __future__ import annotations

from typing import final

from torch import Tensor
from typing_extensions import override

from disthess.graph.batch import rows_by_sample
from disthess.graph.ir import Node
from disthess.rules.base import AbstractRule, Call, Stack, Stacks, Units
from disthess.rules.columns import add_columns
from disthess.rules.generic import LinearMapRule

_PLACED = (
    "scatter.src", "scatter.value", "scatter_add.default", "index_put.default", "index_add.default", "index_copy.default",
    "index_fill.int_Scalar", "put.default", "diagonal_scatter.default", "masked_scatter.default", "masked_select.default",
)  # fmt: skip


@final
class EmbeddingRule(AbstractRule):
    """``embedding(weight, ids)``. The padding row gets no gradient, as in torch: its derivatives are zero."""

    __slots__ = ()

    @override
    def objection(self, node: Node) -> str | None:
        if len(node.args) > 3 and node.args[3]:
            return (
                "with scale_grad_by_freq=True torch divides its gradient by how often a row is used, so that it is the gradient of "
                "no function. Use scale_grad_by_freq=False."
            )
        return None

    @override
    def tangent(self, call: Call, tangents: Stacks) -> Stack:
        stack = tangents[0][:, call.inputs[1]]
        padding = self._padding(call)
        return stack if padding is None else stack.masked_fill(padding.unsqueeze(-1), 0)

    @override
    def add_units(self, call: Call, slot: int, units: Units, total: Stack | None) -> Stack:
        # A table of 30,000 rows is not formed for every tangent: its one entry shows where its row is used.
        rows, columns = units.places
        ids = call.inputs[1]
        used = ids == rows.reshape(-1, *[1] * ids.ndim)
        padding = self._padding(call)
        if padding is not None:
            used = used & ~padding
        moved = used.flatten(1).to(call.output.dtype)
        return add_columns(total, call.output, call.output.ndim - 1, columns, moved)

    @override
    def cotangent(
        self, call: Call, cotangent: Stack | None, tangents: Stacks, wanted: tuple[int, ...]
    ) -> dict[int, Stack]:
        if cotangent is None:
            return {}
        rows = self._kept(call, cotangent).reshape(cotangent.shape[0], -1, cotangent.shape[-1])
        table = cotangent.new_zeros(cotangent.shape[0], *call.inputs[0].shape)
        return {0: table.index_add_(1, call.inputs[1].reshape(-1), rows)}

    @override
    def cotangent_per_sample(self, call: Call, cotangent: Stack | None, tangents: Stacks, slot: int) -> Stack | None:
        if cotangent is None or call.batch is None or call.batch_inputs[1] is None:
            return None
        n, width = call.samples, cotangent.shape[-1]
        rows = rows_by_sample(self._kept(call, cotangent), call.batch, n, lead=1)
        ids = rows_by_sample(call.inputs[1].unsqueeze(-1), call.batch, n).squeeze(-1)
        table = cotangent.new_zeros(cotangent.shape[0], n, *call.inputs[0].shape)
        place = ids.unsqueeze(-1).expand(*ids.shape, width).unsqueeze(0).expand(cotangent.shape[0], -1, -1, -1)
        return table.scatter_add_(2, place, rows)

    def _padding(self, call: Call) -> Tensor | None:
        index = int(call.arguments["padding_idx"])
        rows = call.inputs[0].shape[0]
        return None if index == -1 else call.inputs[1] == index % rows

    def _kept(self, call: Call, cotangent: Stack) -> Stack:
        padding = self._padding(call)
        return cotangent if padding is None else cotangent.masked_fill(padding.unsqueeze(-1), 0)


@final
class GatherRule(AbstractRule):
    """``gather`` and ``index_select``: entries along one axis."""

    __slots__ = ("_whole_rows",)

    def __init__(self, whole_rows: bool) -> None:
        self._whole_rows = whole_rows

    @override
    def tangent(self, call: Call, tangents: Stacks) -> Stack:
        stack, axis = tangents[0], self._axis(call) + 1
        if self._whole_rows:
            return stack.index_select(axis, call.inputs[1].reshape(-1))
        return stack.gather(axis, call.inputs[1].expand(stack.shape[0], *call.inputs[1].shape))

    @override
    def cotangent(
        self, call: Call, cotangent: Stack | None, tangents: Stacks, wanted: tuple[int, ...]
    ) -> dict[int, Stack]:
        if cotangent is None:
            return {}
        axis = self._axis(call) + 1
        whole = cotangent.new_zeros(cotangent.shape[0], *call.inputs[0].shape)
        if self._whole_rows:
            return {0: whole.index_add_(axis, call.inputs[1].reshape(-1), cotangent)}
        index = call.inputs[1].expand(cotangent.shape[0], *call.inputs[1].shape)
        return {0: whole.scatter_add_(axis, index, cotangent)}

    @override
    def keeps_apart(self, call: Call, slot: int, axis: int) -> int | None:
        return axis if slot == 0 and axis != self._axis(call) else None

    def _axis(self, call: Call) -> int:
        return int(call.arguments["dim"]) % call.inputs[0].ndim


def rules() -> dict[str, AbstractRule]:
    """Operation to rule."""
    return {
        "aten.embedding.default": EmbeddingRule(),
        "aten.gather.default": GatherRule(whole_rows=False),
        "aten.index_select.default": GatherRule(whole_rows=True),
        "aten.index.Tensor": LinearMapRule(),
        "aten.take_along_dim.default": LinearMapRule(),
        **{f"aten.{name}": LinearMapRule() for name in _PLACED},
    }
