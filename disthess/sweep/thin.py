"""Panel products of targets that meet one row a sample, without their rows.

For a source ``z[n, u] = sum_j V[u, j] x[n, j]`` and a target whose rows are ``c[u, n, a] y[n, b] + d[n, a] m[u, n, b]``,

    H[(u, j), (a, b)] = sum_n c[u, n, a] (x[n, j] y[n, b]) + sum_n m[u, n, b] (x[n, j] d[n, a])

The pairs ``x_j y_b`` are the same for all units u: the first sum is one product of ``(u, a)`` by ``(j, b)``, and no row of
``a b`` entries is ever formed. The second would double the products, but where y is a function of z, entry by entry, m is
zero except for ``b = u``, and it is one vector a unit.

A source of several rows r (``z[n, r, u] = sum_j V[u, j] x[n, r, j]``) has tangents ``(u, r)``. They are multiplied by its inputs
first, which makes them tangents of its weight's entries ``(u, j)``, and then by the target's vectors:

    H[(u, j), (a, b)] = sum_n (sum_r x[n, r, j] c[(u, r), n, a]) y[n, b] + d[n, a] (sum_r x[n, r, j] m[(u, r), n, b])

That pays where the target has many entries to a vector's (`contracts_first`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from disthess.graph.ir import Graph
from disthess.planning.memory import CACHE_BYTES
from disthess.rules.elementwise import ElementwiseRule
from disthess.rules.products import add_product, product
from disthess.rules.table import rule_for

if TYPE_CHECKING:
    from collections.abc import Collection

    from disthess.rules.base import Stack, ThinRows


def keeps_units(graph: Graph, source: int, readings: Collection[int]) -> bool:
    """Whether every one of some nodes is the source's output or a function of it entry by entry."""
    return all(_entry_by_entry(graph, source, index) for index in readings)


def _entry_by_entry(graph: Graph, source: int, index: int) -> bool:
    while index > source:
        node = graph.nodes[index]
        refs = [ref for ref in node.refs() if graph.nodes[ref].kind != "size"]
        if node.kind != "op" or len(refs) != 1 or not isinstance(rule_for(node.op), ElementwiseRule):
            return False
        index = refs[0]
    return index == source


def add_pairs(sums: Tensor, bent: Stack, inputs: Tensor, others: Tensor) -> None:
    """``sums[u, a, (j, b)] += sum_n bent[u, n, a] x[j, n] y[n, b]``.

    Args:
        sums: ``[U, o, j b]``.
        bent: ``[U, n, o]``.
        inputs: ``x``, ``[j, n]``.
        others: ``y``, ``[n, b]``.
    """
    flat = bent.transpose(1, 2).reshape(-1, bent.shape[1])
    where, second = sums.view(len(flat), -1), others.T.contiguous()
    step = max(1, CACHE_BYTES // (second.numel() * second.element_size()))
    for start in range(0, len(inputs), step):
        pairs = (inputs[start : start + step, None] * second).flatten(0, 1)
        add_product(where[:, start * len(second) : start * len(second) + len(pairs)], flat, pairs.T)


def contracts_first(rows: int, width: int, thin: tuple[int, int], bent: bool, moved: bool) -> bool:
    """Whether it takes fewer multiply-adds to multiply tangents by a source's inputs before they meet the target's vectors.

    Args:
        rows: Of a sample at the source.
        width: Inputs of the source.
        thin: Outputs and inputs of the target.
        bent: Whether there are tangents c.
        moved: Whether there are tangents m.
    """
    outputs, inputs = thin
    before = first_multiply_adds(rows, width, thin, bent, moved)
    return before < rows * outputs * inputs * (width + bent + moved)


def first_multiply_adds(rows: int, width: int, thin: tuple[int, int], bent: bool, moved: bool) -> int:
    """Of `add_first`, per unit and sample."""
    outputs, inputs = thin
    vectors = outputs * bent + inputs * moved
    return width * (rows * vectors + outputs * inputs * (bent + moved))


def add_first(block: Tensor, thin: ThinRows, rows: Tensor) -> None:
    """Both sums of a source of several rows, tangents times its inputs first.

    Args:
        block: ``[U, j, a, b]``.
        thin: The target's vectors; stacks of U R tangents, unit by unit.
        rows: ``x``, ``[n, R, j]``, or ``[U, n, R, j]``.
    """
    if thin.bent is not None:
        _add_first(block, thin.bent, thin.inputs, rows)
    if thin.moved is not None:
        _add_first(block.transpose(2, 3), thin.moved, thin.deltas, rows)


def _add_first(block: Tensor, stack: Stack, others: Tensor, rows: Tensor) -> None:
    """``block[u, j, a, b] += sum_n (sum_r x[n, r, j] stack[(u, r), n, a]) others[n, b]``."""
    count, width, size, _ = block.shape
    samples = rows.shape[-3]
    by_sample = stack.unflatten(0, (count, -1)).permute(2, 0, 3, 1).contiguous()
    step = max(1, CACHE_BYTES // max(1, samples * size * stack.element_size()))
    for start in range(0, width, step):
        inputs = rows[..., start : start + step].expand(count, -1, -1, -1)
        for unit in range(count):
            # One product a sample: tangents of a by the source's inputs j.
            met = torch.bmm(by_sample[:, unit], inputs[unit]).view(samples, -1)
            found = product(others.T, met).view(len(others.T), size, -1)
            block[unit, start : start + step] += found.permute(2, 1, 0)


def add_own(block: Tensor, moved: Tensor, inputs: Tensor, deltas: Tensor, first: int) -> None:
    """``block[u, j, a, first + u] += sum_n moved[u, n, first + u] x[j, n] d[n, a]``.

    Args:
        block: ``[U, j, o, i]``.
        moved: ``[U, n, i]``.
        inputs: ``x``, ``[j, n]``.
        deltas: ``d``, ``[n, o]``.
        first: Number of the first unit.
    """
    units = torch.arange(len(moved), device=moved.device)
    own = moved[units, :, first + units]
    block[units, :, :, first + units] += torch.matmul(own[:, None] * inputs, deltas)
