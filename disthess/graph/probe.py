"""The NaN probe: which rows of an operation's output can one sample's inputs reach?

One sample's inputs are replaced (NaN in floating values, another valid value in integers) and the operation is run once more,
alone. If some arrangement of the batch axis explains every changed entry (beyond rounding) as belonging to that sample, samples
do not mix in it; the arrangement (``outer`` before ``inner``) is recorded, so that token-major flattening is seen for what it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from disthess.graph.batch import take_samples
from disthess.graph.ir import BatchAxis, Graph, Node
from disthess.graph.run import evaluate
from disthess.types import Span


def probe_samples(graph: Graph, values: Sequence[Any]) -> tuple[Graph, str]:
    """Probe every operation with a batch axis that a live node may read, for the first, middle and last sample.

    Args:
        graph: With batch axes read off the shapes.
        values: Every node's value on the captured batch.

    Returns:
        The graph with arrangements of its batch axes, and an empty string; or a sentence on which node mixes samples.
    """
    nodes = list(graph.nodes)
    samples = graph.samples
    needed = _needed(graph)
    for index, node in enumerate(nodes):
        if node.kind != "op" or node.batch is None or node.batch.dim < 0 or index not in needed:
            continue
        changed = [_changed(nodes, node, values, sample, samples) for sample in sorted({0, samples // 2, samples - 1})]
        arrangement = _arrangement(node.batch, changed, samples)
        if arrangement is None:
            return graph, f"{node.name} ({node.op}) mixes samples"
        nodes[index] = dataclasses.replace(node, batch=arrangement)
    return dataclasses.replace(graph, nodes=tuple(nodes)), ""


def _needed(graph: Graph) -> set[int]:
    """Live nodes and whatever fixed nodes they depend on."""
    needed: set[int] = set()
    for node in reversed(graph.nodes):
        if node.live or node.index in needed:
            needed.add(node.index)
            needed.update(node.refs())
    return needed


def _changed(nodes: Sequence[Node], node: Node, values: Sequence[Any], sample: int, samples: int) -> tuple[int, Tensor]:
    poisoned = list(values)
    for ref in set(node.refs()):
        axis = nodes[ref].batch
        if axis is not None and axis.dim >= 0 and isinstance(values[ref], Tensor):
            poisoned[ref] = _poison(values[ref], axis, sample, samples)
    before, after = values[node.index], evaluate(node, poisoned)
    changed = before != after
    # What differs is little, one sample's: the rest is looked at once.
    places = changed.nonzero(as_tuple=True)
    changed[places] = ~_same(before[places], after[places], before)
    return sample, changed


def _same(before: Tensor, after: Tensor, whole: Tensor) -> Tensor:
    """Which entries are equal after all: NaN twice, or rounded otherwise. ``whole``: the value that ``before`` is of."""
    same = (before != before) & (after != after)
    if not before.is_floating_point() or bool((before - after).isnan().all()):
        return same
    # Vectorised kernels may round lanes beside a NaN differently, entries near zero in proportion to the terms of their sums;
    # a leak shows as NaN or as another value.
    sizes = whole[torch.isfinite(whole)].abs()
    rounding = 64 * torch.finfo(whole.dtype).eps * (float(sizes.max()) if sizes.numel() else 0.0)
    return same | ((before - after).abs() <= 1e-4 * before.abs() + rounding)


def _poison(value: Tensor, axis: BatchAxis, sample: int, samples: int) -> Tensor:
    copy = value.clone().contiguous()
    apart = copy.view(*copy.shape[: axis.dim], axis.outer, samples, axis.inner, *copy.shape[axis.dim + 1 :])
    rows = apart.select(axis.dim + 1, sample)
    if value.is_floating_point():
        rows.fill_(float("nan"))
    elif value.dtype == torch.bool:
        rows.logical_not_()
    else:
        low, high = int(value.min()), int(value.max())
        rows.copy_((rows - low + 1) % (high - low + 1) + low)
    return copy


def _arrangement(axis: BatchAxis, changed: list[tuple[int, Tensor]], samples: int) -> BatchAxis | None:
    total = axis.rows_per_sample
    for outer in (divisor for divisor in range(1, total + 1) if total % divisor == 0):
        candidate = BatchAxis(axis.dim, outer, total // outer)
        if all(_only(candidate, sample, mask, samples) for sample, mask in changed):
            return candidate
    return None


def _only(axis: BatchAxis, sample: int, mask: Tensor, samples: int) -> bool:
    """Whether every changed entry belongs to that sample under this arrangement."""
    inside = take_samples(mask, axis, Span(sample, sample + 1), samples)
    return int(inside.sum()) == int(mask.sum())
