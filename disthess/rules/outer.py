"""Sums of outer products of rows: what a dense layer's weight is moved by, sample by sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FEW_ROWS = 64
"""Rows of a sample, in products of two or more, up to which they are faster as one."""


Pairs = Sequence[tuple[Tensor, Tensor]]
"""Of ``[(K,) n, r, o]`` and ``[(K,) n, r, i]``; one of each pair has the K tangents."""


def outers_per_sample(pairs: Pairs) -> Tensor:
    """``sum over pairs and rows r of left[(k,) n, r, o] right[(k,) n, r, i]``: ``[K, n, o, i]``."""
    if together([left.shape[-2] for left, _ in pairs]):
        # The sum of some thin products is one product of all their rows: written once, and less thin.
        count = max(part.shape[0] for pair in pairs for part in pair if part.ndim == 4)
        left, right = (
            torch.cat([part.expand(count, *part.shape[-3:]) for part in side], dim=2)
            for side in zip(*pairs, strict=True)
        )
        rows = torch.bmm(left.flatten(0, 1).transpose(1, 2), right.flatten(0, 1))
        return rows.unflatten(0, (count, -1))
    first, *others = pairs
    total = _outer_per_sample(*first, None)
    for left, right in others:
        total = _outer_per_sample(left, right, total)
    return total


def together(rows: Sequence[int]) -> bool:
    """Whether pairs of so many rows are multiplied as one."""
    return len(rows) > 1 and 2 < sum(rows) <= FEW_ROWS


def outer_multiply_adds(rows: Sequence[int]) -> int:
    """Of `outers_per_sample`, per tangent, sample and entry; what is multiplied entry by entry does not count."""
    return sum(rows) if together(rows) else sum(count for count in rows if count > 1)


def _outer_per_sample(left: Tensor, right: Tensor, total: Tensor | None) -> Tensor:
    """``sum_r left[(k,) n, r, o] right[(k,) n, r, i]``, added to ``total`` in place if given: ``[K, n, o, i]``."""
    if left.shape[-2] == 1:
        left = left.transpose(-1, -2)
        return left * right if total is None else total.addcmul_(left, right)
    count = left.shape[0] if left.ndim == 4 else right.shape[0]
    left, right = left.expand(count, *left.shape[-3:]), right.expand(count, *right.shape[-3:])
    if total is None:
        total = left.new_empty(count, left.shape[1], left.shape[3], right.shape[3])
        for tangent in range(count):
            torch.bmm(left[tangent].transpose(1, 2), right[tangent], out=total[tangent])
        return total
    for tangent in range(count):
        add_batch(left[tangent].transpose(1, 2), right[tangent], total[tangent])
    return total


def add_batch(left: Tensor, right: Tensor, total: Tensor | None) -> Tensor:
    """``left[b] right[b]``, ``[B, m, k]`` by ``[B, k, n]``, added to ``total`` in place if given."""
    # With out=, not in place: torch's FLOP counter sees the one and not the other.
    return torch.bmm(left, right) if total is None else torch.baddbmm(total, left, right, out=total)
