"""Which node bends the loss how much: the residual part of the Hessian, split over the nodes of the model.

With ``A_x`` the total derivatives of all arguments of node x by theta, and ``S_x = sum_i delta_i d2 g_i`` its own curvature,

    H = GGN + sum over nodes x of  C_x,   C_x = A_x^T S_x A_x

summed over samples, in the objective's own scale. A linear layer counts as well: it is bilinear in its weight and its input.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from disthess.errors import PlanError
from disthess.graph.ir import Node
from disthess.sweep.frame import Frame
from disthess.sweep.primal import Primal
from disthess.sweep.probe import probe_products
from disthess.sweep.wave import forward
from disthess.types import Part, Span
from disthess.units import human_bytes

TANGENT_BYTES = 256 << 20
"""Aim for the bytes of all tangents of one microbatch."""

MATRIX_BYTES = 1 << 30
"""Matrices of nodes that are summed up in one pass over the data, at most (but at least one)."""


@dataclass(frozen=True, slots=True)
class NodeRow:
    """One node's contribution ``C_x``.

    Attributes:
        name: Name of the node.
        op: Its operation.
        norm: ``|C_x|_F``.
        trace: Of ``C_x``; the traces of all nodes add up to that of the sum.
        share: ``<C_x, R>_F / |R|_F^2`` with R the sum over all nodes; the shares add up to 1.
    """

    name: str
    op: str
    norm: float
    trace: float
    share: float


@dataclass(frozen=True, slots=True)
class NodeCurvature:
    """The split.

    Attributes:
        part: What the nodes add up to: ``residual``, or ``hessian`` where the end of the model is not known.
        rows: One per node that contributes, in topological order.
        total_norm: ``|R|_F``.
        defect: ``|R - sum_x C_x|_F / |R|_F``, R computed by the sweep in one go: rounding, and nothing else.
        matrices: ``C_x`` by node, ``[P, P]`` each in user order, where they were asked for.
    """

    part: Part
    rows: tuple[NodeRow, ...]
    total_norm: float
    defect: float
    matrices: Mapping[str, Tensor]


def split_curvature(
    primals: Sequence[Primal], parameters: Mapping[str, Tensor], part: Part, free_bytes: int, keep: bool
) -> NodeCurvature:
    """Split the residual part (or the Hessian) over nodes.

    Args:
        primals: One per batch.
        parameters: Those whose Hessian it is, in order.
        part: ``residual`` for the nodes inside the model, ``hessian`` for all.
        free_bytes: Memory that may be used.
        keep: Whether to return the matrices.

    Raises:
        PlanError: The matrices do not fit in memory, with the sizes.
    """
    numel = sum(tensor.numel() for tensor in parameters.values())
    like = next(iter(parameters.values())).detach()
    nodes = _candidates(primals, part)
    matrix = numel * numel * like.element_size()
    needed = matrix * (4 + (len(nodes) if keep else 0)) + TANGENT_BYTES
    if needed > free_bytes:
        raise PlanError(
            f"splitting the curvature of {numel:,} parameters over {len(nodes)} nodes takes {human_bytes(needed)} of memory and "
            f"{human_bytes(free_bytes)} are available. Select fewer parameters{', or leave matrices=True out' if keep else ''}."
        )
    whole = _whole(primals, parameters, part, numel, like)
    squared = float(whole.square().sum())
    group = max(1, MATRIX_BYTES // max(1, matrix))
    rest, rows, kept = whole.clone(), [], {}
    for first in range(0, len(nodes), group):
        for node, found in _matrices(primals, parameters, part, nodes[first : first + group], like).items():
            rest -= found
            norm = float(found.norm())
            if norm > 0:
                share = float((found * whole).sum()) / squared if squared else math.nan
                rows.append(NodeRow(node[0], node[1], norm, float(found.trace()), share))
                if keep:
                    kept[node[0]] = found
    scale = math.sqrt(squared)
    defect = float(rest.norm()) / scale if scale else float(rest.norm())
    return NodeCurvature(part, tuple(rows), scale, defect, kept)


def _candidates(primals: Sequence[Primal], part: Part) -> list[tuple[str, str]]:
    found: dict[tuple[str, str], None] = {}
    for primal in primals:
        for node in primal.graph.nodes:
            if _counts(node, part):
                found.setdefault((node.name, node.op))
    return list(found)


def _counts(node: Node, part: Part) -> bool:
    return node.kind == "op" and node.live and node.region != "total" and (part == "hessian" or node.in_model)


def _whole(primals: Sequence[Primal], parameters: Mapping[str, Tensor], part: Part, numel: int, like: Tensor) -> Tensor:
    rows = []
    for start in range(0, numel, 256):
        units = like.new_zeros(min(256, numel - start), numel)
        units[torch.arange(len(units)), torch.arange(start, start + len(units))] = 1
        rows.append(probe_products(primals, parameters, units, part=part))
    return torch.cat(rows)


def _matrices(
    primals: Sequence[Primal],
    parameters: Mapping[str, Tensor],
    part: Part,
    wanted: Sequence[tuple[str, str]],
    like: Tensor,
) -> dict[tuple[str, str], Tensor]:
    numel = sum(tensor.numel() for tensor in parameters.values())
    found = {key: like.new_zeros(numel, numel) for key in wanted}
    with torch.no_grad():
        for primal in primals:
            seeds = _units(primal, parameters, numel)
            for frame in _frames(primal, numel * like.element_size()):
                tangents = forward(frame, seeds)
                for node in primal.graph.nodes:
                    key = (node.name, node.op)
                    if key in found and _counts(node, part) and (frame.first or node.region != "weight"):
                        _add(frame, node, tangents, found[key])
    return found


def _add(frame: Frame, node: Node, tangents: Mapping[int, Tensor], total: Tensor) -> None:
    """``C_x += sum over arguments a, b of x_a'^T S_ab x_b'`` on the frame's samples."""
    refs = frame.slots(node.index)
    held = {slot: tangents[ref] for slot, ref in enumerate(refs) if ref in tangents}
    if not held:
        return
    bent = frame.rule(node.index).cotangent(frame.call(node.index), None, held, tuple(held))
    for slot, rows in bent.items():
        total.addmm_(rows.reshape(len(total), -1), held[slot].reshape(len(total), -1).T)


def _units(primal: Primal, parameters: Mapping[str, Tensor], numel: int) -> dict[int, Tensor]:
    seeds, start = {}, 0
    for name, tensor in parameters.items():
        unit = tensor.detach().new_zeros(numel, tensor.numel())
        unit[start + torch.arange(tensor.numel()), torch.arange(tensor.numel())] = 1
        start += tensor.numel()
        for node in primal.graph.nodes:
            if node.kind == "use" and node.live and node.op == name:
                seeds[node.index] = unit.reshape(numel, *tensor.shape)
    return seeds


def _frames(primal: Primal, bytes_per_entry: int) -> Iterator[Frame]:
    entries = sum(
        value.numel()
        for node, value in zip(primal.graph.nodes, primal.values, strict=True)
        if node.live and node.kind == "op"
    )
    per_sample = max(1, entries // primal.samples) * bytes_per_entry
    size = max(1, min(primal.samples, TANGENT_BYTES // per_sample))
    for start in range(0, primal.samples, size):
        yield Frame(primal, Span(start, min(start + size, primal.samples)))
