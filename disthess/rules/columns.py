"""Add to one column of every tangent of a stack: what a unit vector of a weight moves."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from disthess.rules.base import Stack


def add_columns(total: Stack | None, like: Tensor, axis: int, columns: Tensor, moved: Tensor) -> Stack:
    """``total[k, ..., columns[k], ...] += moved[k]``, in place where it is contiguous.

    Args:
        total: ``[K, *like.shape]``; None for zero.
        like: A value of the stack's shape.
        axis: Of the columns, in ``like``.
        columns: One for each tangent, ``[K]``.
        moved: ``[K, *rest]``: the axes of ``like`` but that one.
    """
    whole = moved.new_zeros(len(moved), *like.shape) if total is None else total.contiguous()
    before, after = math.prod(like.shape[:axis]), math.prod(like.shape[axis + 1 :])
    where = whole.view(len(moved), before, like.shape[axis], after)
    each = torch.arange(len(moved), device=columns.device)
    rest = moved.reshape(len(moved), before, after)
    if total is None:
        where[each, :, columns] = rest
    else:
        where[each, :, columns] += rest
    return whole
