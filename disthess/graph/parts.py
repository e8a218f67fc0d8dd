"""A linear layer whose weight is put together from parts, as the layers of its parts.

``x [A; B]^T = [x A^T, x B^T]`` and ``x [A, B]^T = x1 A^T + x2 B^T``. Where a range is cut out of a weight, or q, k and v are joined
to one, each part is then the weight of a layer of its own, whose block takes a sweep per output in place of one per entry.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

_ATEN = torch.ops.aten


def part_linear_layers(program: ExportedProgram) -> None:
    """Rewrite such layers in the program's graph, as exported, before decompositions."""
    for node in list(program.graph.nodes):
        if node.target is not _ATEN.linear.default:
            continue
        given, weight, bias = (*node.args, None)[:3]
        if isinstance(given, fx.Node) and isinstance(weight, fx.Node) and _holds_leaf(weight):
            with program.graph.inserting_before(node):
                found = _product(node, given, weight)
                if bias is not None:
                    found = _call(node, _ATEN.add.Tensor, found, bias)
            node.replace_all_uses_with(found)
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()


def _pieces(weight: fx.Node) -> tuple[list[fx.Node], int] | None:
    """What a matrix is joined from and along which axis; None if it is not."""
    if weight.target is not _ATEN.cat.default or len(weight.meta["val"].shape) != 2:
        return None
    pieces, axis = weight.args[0], weight.args[1] if len(weight.args) > 1 else 0
    apart = isinstance(pieces, (list, tuple)) and all(isinstance(piece, fx.Node) for piece in pieces)
    return (list(pieces), int(axis) % 2) if apart else None  # type: ignore[arg-type, call-overload]


def _holds_leaf(weight: fx.Node) -> bool:
    """Whether one of the pieces is a whole tensor of the model."""
    found = _pieces(weight)
    return found is not None and any(piece.op == "placeholder" or _holds_leaf(piece) for piece in found[0])


def _product(node: fx.Node, given: fx.Node, weight: fx.Node) -> fx.Node:
    found = _pieces(weight)
    if found is None:
        return _call(node, _ATEN.linear.default, given, weight)
    pieces, axis = found
    if axis == 0:
        return _call(node, _ATEN.cat.default, [_product(node, given, piece) for piece in pieces], -1)
    parts, start = [], 0
    for piece in pieces:
        stop = start + int(piece.meta["val"].shape[1])
        parts.append(_product(node, _call(node, _ATEN.slice.Tensor, given, -1, start, stop), piece))
        start = stop
    return functools.reduce(lambda total, part: _call(node, _ATEN.add.Tensor, total, part), parts)


def _call(node: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A new node of the layer that ``node`` belongs to, with its example value."""
    made = node.graph.call_function(target, args)
    made.meta = {key: value for key, value in node.meta.items() if key != "val"}
    values = fx.map_arg(args, lambda entry: entry.meta["val"])
    with node.meta["val"].fake_mode:
        made.meta["val"] = target(*values)
    return made
