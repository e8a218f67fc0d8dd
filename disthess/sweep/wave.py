"""Forward tangents from a source to the loss, and the reverse wave back down.

With ``x'`` tangents and ``x''`` cotangent tangents (the tangent of ``delta``), per node ``f = g(x_0, x_1, ...)``:

* forward:  ``f' = sum_a D_a x_a'  (+ seed)``
* reverse:  ``x_a'' += D_a^T f'' + sum_b S_ab x_b'  (+ seed)``

What the reverse wave leaves at a parameter leaf is a panel block, at any other node an activation block. The parts differ
only in which nodes' S they keep: all (``hessian``), those after the model's outputs (``ggn``), those inside it (``residual``).
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, overload

import torch
from torch import Tensor

from disthess.graph.ir import Node
from disthess.rules.base import Call, Stack, Units
from disthess.sweep.frame import Frame
from disthess.sweep.single import one_sample
from disthess.types import Part


class AbstractSink(abc.ABC):
    """Takes what the reverse wave leaves at parameter leaves."""

    @property
    @abc.abstractmethod
    def per_sample(self) -> bool:
        """Whether leaves want their cotangent before the sum over samples."""

    @abc.abstractmethod
    def take(self, leaf: int, rows: Stack) -> None:
        """``[K, *parameter]``, or ``[K, n, *parameter]`` if ``per_sample``."""

    def see(self, frame: Frame, index: int, cotangent: Stack) -> None:
        """The whole of what arrives at an operation or input, ``[K, *value]``: rows of its activation blocks."""
        return

    def take_call(
        self, frame: Frame, index: int, call: Call, slot: int, cotangent: Stack | None, tangents: Mapping[int, Stack]
    ) -> None:
        """A leaf that feeds a node with samples, in a ``per_sample`` wave: the sink evaluates it block by block."""
        raise NotImplementedError

    def finish(self) -> None:
        """The wave has come to its end."""
        return


@overload
def forward(frame: Frame, seeds: Mapping[int, Stack]) -> dict[int, Stack]: ...
@overload
def forward(frame: Frame, seeds: Mapping[int, Stack | Units]) -> dict[int, Stack | Units]: ...
def forward(frame: Frame, seeds: Mapping[int, Stack | Units]) -> Any:
    """Tangents of every node that a seed reaches, ``[K, *value]`` each.

    Args:
        frame: The microbatch.
        seeds: Tangents added at nodes: at a use leaf its own, at an operation a perturbation of its output. Unit vectors
            may be given as such at leaves.

    Returns:
        By node index; nodes not reached are left out (zero).
    """
    tangents: dict[int, Stack | Units] = {}
    for node in frame.primal.graph.nodes[min(seeds) :]:
        if not node.live or node.region == "total":
            continue
        found, units = _tangents_of(frame, node, tangents)
        stack: Stack | Units | None = None
        if found or units:
            stack = _tangent(frame, node.index, found, units)
        seed = seeds.get(node.index)
        if seed is not None:
            stack = seed if stack is None else _both(stack, seed)
        if stack is not None:
            tangents[node.index] = stack
    return tangents


def reverse(
    frame: Frame,
    tangents: Mapping[int, Stack | Units],
    part: Part,
    passed: Sequence[int],
    sink: AbstractSink,
    seeds: Mapping[int, Stack] = MappingProxyType({}),
) -> None:
    """The reverse wave, handing each target leaf's rows to ``sink``.

    Args:
        frame: The microbatch.
        tangents: From `forward`.
        part: Which nodes' S are kept.
        passed: Nodes on the way to the targets, from the loss down (`disthess.graph.waves.leading_to`).
        sink: Receives rows.
        seeds: Cotangents that start at nodes on the way, beside what the nodes' S gives.
    """
    graph = frame.primal.graph
    members = frozenset(passed)
    cotangents: dict[int, Stack] = {index: stack for index, stack in seeds.items() if index in members}
    for index in passed:
        node = graph.nodes[index]
        if not node.live or node.region == "total":
            continue
        cotangent = cotangents.pop(index, None)
        if cotangent is not None and node.kind != "use":
            sink.see(frame, index, cotangent)
        if node.kind != "op":
            if cotangent is not None and node.kind == "use":
                sink.take(index, cotangent)
            continue
        kept, units = _tangents_of(frame, node, tangents) if keeps_curvature(frame, node, part) else ({}, {})
        if cotangent is not None or kept or units:
            _node_step(frame, node, cotangent, kept, units, members, sink, cotangents)
    sink.finish()


def _node_step(
    frame: Frame,
    node: Node,
    cotangent: Stack | None,
    kept: Mapping[int, Stack],
    units: Mapping[int, Units],
    members: frozenset[int],
    sink: AbstractSink,
    cotangents: dict[int, Stack],
) -> None:
    graph = frame.primal.graph
    call, rule, refs = frame.call(node.index), frame.rule(node.index), frame.slots(node.index)
    wanted = tuple(slot for slot, ref in enumerate(refs) if ref in members and graph.nodes[ref].live)
    if sink.per_sample and node.region == "sample":
        apart = tuple(slot for slot in wanted if graph.nodes[refs[slot]].region == "weight")
        wanted = tuple(slot for slot in wanted if slot not in apart)
        for slot in apart:
            if graph.nodes[refs[slot]].kind == "use":
                sink.take_call(frame, node.index, call, slot, cotangent, kept)
            else:
                rows = per_sample_rows(frame, node.index, call, slot, cotangent, kept)
                _add(cotangents, refs[slot], rows.flatten(0, 1))
    if wanted:
        found = rule.cotangent(call, cotangent, kept, wanted) if cotangent is not None or kept else {}
        for slot, unit in units.items():
            rule.add_units_back(call, slot, unit, wanted, found)
        for slot, stack in found.items():
            _add(cotangents, refs[slot], stack)


def per_sample_rows(
    frame: Frame, index: int, call: Call, slot: int, cotangent: Stack | None, tangents: Mapping[int, Stack]
) -> Stack:
    """``[K, n, *input]`` of a slot shared by all samples; sample by sample where the rule has no closed form."""
    rule = frame.rule(index)
    rows = rule.cotangent_per_sample(call, cotangent, tangents, slot)
    if rows is not None:
        return rows
    pieces = []
    for sample in range(frame.samples):
        alone, part, parts = one_sample(frame, index, sample, cotangent, tangents)
        found = rule.cotangent(alone, part, parts, (slot,))
        some = part if part is not None else next(iter(parts.values()))
        zero = some.new_zeros(some.shape[0], *call.inputs[slot].shape)
        pieces.append(found.get(slot, zero))
    return torch.stack(pieces, dim=1)


def keeps_curvature(frame: Frame, node: Node, part: Part) -> bool:
    """Whether a wave of a part takes a node's S into account."""
    if node.region == "weight" and not frame.first:
        return False
    return part == "hessian" or node.in_model == (part == "residual")


def _tangents_of(
    frame: Frame, node: Node, tangents: Mapping[int, Stack | Units]
) -> tuple[dict[int, Stack], dict[int, Units]]:
    """Of a node's arguments, by slot: stacks, and unit vectors."""
    stacks: dict[int, Stack] = {}
    units: dict[int, Units] = {}
    if node.kind == "op":
        for slot, ref in enumerate(frame.slots(node.index)):
            tangent = tangents.get(ref)
            if isinstance(tangent, Units):
                units[slot] = tangent
            elif tangent is not None:
                stacks[slot] = tangent
    return stacks, units


def _tangent(frame: Frame, index: int, found: Mapping[int, Stack], units: Mapping[int, Units]) -> Stack | None:
    rule, call = frame.rule(index), frame.call(index)
    stack = rule.tangent(call, found) if found else None
    for slot, unit in units.items():
        stack = rule.add_units(call, slot, unit, stack)
    return stack


def _both(stack: Stack | Units, seed: Stack | Units) -> Stack:
    if isinstance(stack, Units) or isinstance(seed, Units):
        raise AssertionError("unit vectors are seeds of leaves, which have no other tangents")
    return stack + seed


def _add(stacks: dict[int, Tensor], index: int, stack: Tensor) -> None:
    stacks[index] = stack if index not in stacks else stacks[index] + stack
