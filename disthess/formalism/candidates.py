"""Which entries of a tensor compete for each output of a maximum, a pooling window or an order: flat indices, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from disthess.graph.ir import Node


def candidates(node: Node, shape: Sequence[int]) -> Tensor:
    """Flat input indices of each output's candidates, ``[outputs, candidates]``; one past the end stands for padding.

    Args:
        node: A maximum or minimum over axes, or a max pooling.
        shape: Of its input.
    """
    grid = torch.arange(math.prod(shape)).reshape(tuple(shape))
    if ".adaptive_max_pool" in node.op:
        return _adaptive(node, grid)
    if ".max_pool" in node.op:
        return _windows(node, grid)
    dims = _dims(node, len(shape), 2 if "vector_norm" in node.op else 1)
    kept = [dim for dim in range(len(shape)) if dim not in dims]
    outputs = math.prod(shape[dim] for dim in kept)
    return grid.permute(*kept, *dims).reshape(outputs, -1)


def position(node: Node, shape: Sequence[int], flat: int) -> int:
    """What an index output says of a winner: its place along the axis, or in the plane of a pooling."""
    if "max_pool" in node.op:
        spatial = 1 if "1d" in node.op else 3 if "3d" in node.op else 2
        return flat % math.prod(shape[-spatial:])
    dims = _dims(node, len(shape))
    if len(dims) == len(shape):
        return flat
    stride = math.prod(shape[dims[0] + 1 :])
    return flat // stride % shape[dims[0]]


def line_of(node: Node, shape: Sequence[int]) -> Tensor:
    """Flat input indices of each line that an operation puts in order, ``[lines, entries]``."""
    grid = torch.arange(math.prod(shape)).reshape(tuple(shape))
    named = _order_dim(node)
    if named is None or not shape:
        return grid.reshape(1, -1)
    dim = named % len(shape)
    return grid.movedim(dim, -1).reshape(-1, shape[dim])


def _order_dim(node: Node) -> int | None:
    """The axis that is put in order; None where all entries are."""
    name = node.op.split(".")[1]
    if name == "msort":
        return 0
    whole = node.op.endswith("median.default") or "quantile" in name
    place = 2 if whole or name in ("topk", "kthvalue") else 1
    given = [entry for entry in node.args[place:] if isinstance(entry, int) and not isinstance(entry, bool)]
    named = dict(node.kwargs).get("dim", given[0] if given else None)
    if named is None:
        return None if whole else -1
    return int(named)


def _dims(node: Node, ndim: int, place: int = 1) -> list[int]:
    given = node.args[place] if len(node.args) > place else dict(node.kwargs).get("dim", ())
    if given is None:
        given = ()
    chosen = list(given) if isinstance(given, tuple) else [given]
    return [int(dim) % ndim for dim in chosen] if chosen and ndim else list(range(ndim))


def _windows(node: Node, grid: Tensor) -> Tensor:
    """Members of each pooling window, found by pooling the grid of indices itself: padding marked one past the end."""
    spatial = 1 if "1d" in node.op else 3 if "3d" in node.op else 2
    kernel = _each(node.args[1], spatial)
    stride = _each(node.args[2], spatial) if len(node.args) > 2 and node.args[2] else kernel
    padding = _each(node.args[3], spatial) if len(node.args) > 3 else [0] * spatial
    dilation = _each(node.args[4], spatial) if len(node.args) > 4 else [1] * spatial
    ceil = bool(node.args[5]) if len(node.args) > 5 else False
    starts = [
        _starts(*entry, ceil) for entry in zip(grid.shape[-spatial:], kernel, stride, padding, dilation, strict=True)
    ]
    planes = grid.reshape(-1, *grid.shape[-spatial:])
    end = grid.numel()
    axes = []
    for size, first, reach, step in zip(grid.shape[-spatial:], starts, kernel, dilation, strict=True):
        index = torch.tensor(first)[:, None] + step * torch.arange(reach)[None, :]
        axes.append(torch.where((index < 0) | (index >= size), -1, index))
    out = planes
    for axis, index in enumerate(axes):
        # One axis at a time: [planes, done..., here, rest...] becomes [planes, done..., windows, members, rest...].
        out = _take(out, 1 + 2 * axis, index, end)
    order = [0, *(1 + 2 * axis for axis in range(spatial)), *(2 + 2 * axis for axis in range(spatial))]
    return out.permute(*order).reshape(-1, math.prod(kernel))


def _starts(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil: bool) -> list[int]:
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (-(-span // stride) if ceil else span // stride) + 1
    if ceil and (count - 1) * stride >= size + padding:
        count -= 1
    return [-padding + stride * number for number in range(count)]


def _adaptive(node: Node, grid: Tensor) -> Tensor:
    spatial = 1 if "1d" in node.op else 3 if "3d" in node.op else 2
    wanted = _each(node.args[1], spatial)
    out = grid.reshape(-1, *grid.shape[-spatial:])
    members = []
    for axis, (size, count) in enumerate(zip(grid.shape[-spatial:], wanted, strict=True)):
        first = [number * size // count for number in range(count)]
        last = [-(-(number + 1) * size // count) for number in range(count)]
        width = max(b - a for a, b in zip(first, last, strict=True))
        index = torch.tensor(
            [[a + k if a + k < b else -1 for k in range(width)] for a, b in zip(first, last, strict=True)]
        )
        members.append(width)
        out = _take(out, 1 + 2 * axis, index, grid.numel())
    order = [0, *(1 + 2 * axis for axis in range(spatial)), *(2 + 2 * axis for axis in range(spatial))]
    return out.permute(*order).reshape(-1, math.prod(members))


def _take(values: Tensor, dim: int, index: Tensor, end: int) -> Tensor:
    """Replace axis ``dim`` by the two axes of ``index``; entries of -1 become ``end``."""
    taken = values.index_select(dim, index.clamp_min(0).reshape(-1))
    taken = taken.reshape(*values.shape[:dim], *index.shape, *values.shape[dim + 1 :])
    shape = [1] * dim + list(index.shape) + [1] * (values.ndim - dim - 1)
    return torch.where(index.reshape(shape) < 0, end, taken)


def _each(value: Any, count: int) -> list[int]:
    if isinstance(value, int):
        return [value] * count
    return [int(entry) for entry in value] * (count if len(value) == 1 else 1)
