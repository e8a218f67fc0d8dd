"""Take samples out of values whose batch axis is known, and put rows of one sample together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from disthess.graph.ir import BatchAxis
from disthess.types import Span


def take_samples(value: Tensor, axis: BatchAxis, span: Span, samples: int) -> Tensor:
    """The samples in ``span``, as a value of the same layout (a view where ``outer`` is 1)."""
    if span.size == samples:
        return value
    if axis.outer == 1:
        return value.narrow(axis.dim, span.start * axis.inner, span.size * axis.inner)
    apart = value.unflatten(axis.dim, (axis.outer, samples, axis.inner))
    return apart.narrow(axis.dim + 1, span.start, span.size).flatten(axis.dim, axis.dim + 2)


def pick_samples(value: Tensor, axis: BatchAxis, picked: Sequence[int], samples: int) -> Tensor:
    """The samples of ``picked``, in that order, as a value of the same layout."""
    apart = value.unflatten(axis.dim, (axis.outer, samples, axis.inner))
    places = torch.tensor(picked, dtype=torch.long, device=value.device)
    return apart.index_select(axis.dim + 1, places).flatten(axis.dim, axis.dim + 2)


def rows_by_sample(value: Tensor, axis: BatchAxis | None, samples: int, lead: int = 0, tail: int = 1) -> Tensor:
    """Rows grouped by sample: ``[*lead axes, n, R, *last tail axes]``.

    Args:
        value: ``[*lead axes, *value axes]``.
        axis: Batch axis of the value (not counting the lead axes), or None: then n is 1 and all rows are its rows.
        samples: n.
        lead: Number of leading axes that are not the value's (1 for a stack).
        tail: Number of last axes that are kept as they are.

    Returns:
        Rows of a sample are ordered by (outer, inner, other axes from left to right).
    """
    kept = value.shape[value.ndim - tail :]
    leading = value.shape[:lead]
    if axis is None:
        return value.reshape(*leading, 1, -1, *kept)
    apart = value.unflatten(lead + axis.dim, (axis.outer, samples, axis.inner))
    place = lead + axis.dim
    moved = apart.movedim((place + 1, place, place + 2), (lead, lead + 1, lead + 2))
    return moved.reshape(*leading, samples, -1, *kept)


def rows_from_sample(rows: Tensor, like: tuple[int, ...], axis: BatchAxis | None, samples: int) -> Tensor:
    """The inverse of `rows_by_sample` for a stack: ``[K, n, ...]`` back to ``[K, *like]``."""
    if axis is None:
        return rows.reshape(-1, *like)
    others = [size for dim, size in enumerate(like) if dim != axis.dim]
    apart = rows.reshape(rows.shape[0], samples, axis.outer, axis.inner, *others)
    place = 1 + axis.dim
    moved = apart.movedim((2, 1, 3), (place, place + 1, place + 2))
    return moved.reshape(rows.shape[0], *like)
