"""Tied units and what each can become: the smooth pieces that meet there, as changes to how a captured graph is evaluated."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from disthess.errors import ProblemError
from disthess.formalism.candidates import candidates, line_of, position
from disthess.formalism.kinks import (
    closeness,
    competing,
    is_smallest,
    is_tieable,
    kind_of,
    moving,
    nearest_places,
    operands,
    tied_candidates,
)
from disthess.graph.ir import Graph, Node, Ref
from disthess.graph.run import evaluate, leaves

STEP = 1e-11
"""How far beside a kink an operation is evaluated to get one side's derivatives, relative to the input's magnitude."""

MAX_CLUSTER = 6
"""Equal entries of one order that are told apart: 6! = 720 orders."""


@dataclass(frozen=True, slots=True)
class Option:
    """One smooth piece of a tied unit.

    Attributes:
        text: What it takes, for people: ``above 0``, ``entry 3``.
        signs: Pairs ``(sign, flat entry or pair of entries)`` of quantities that are positive on that piece's side.
        choice: What the evaluation takes: a side (-1 or +1), an operand, an entry, or an order of entries.
    """

    text: str
    signs: tuple[tuple[float, tuple[int, ...]], ...]
    choice: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TiedUnit:
    """An entry (or a group of equal entries) of one call, and its options.

    Attributes:
        batch: Which batch.
        node: Name of the node.
        op: Its operation.
        entry: Flat entry: of the input for kinks and orders, of the output for the others.
        options: The smooth pieces that meet.
        place: Of a kink at a fixed input: which.
    """

    batch: int
    node: str
    op: str
    entry: int
    options: tuple[Option, ...]
    place: float = math.nan


@dataclass(frozen=True, slots=True)
class TiedCall:
    """All tied units of one call of an operation (which may be several nodes: values and indices).

    Attributes:
        nodes: Indices of its nodes, the first in topological order first.
        units: Its units.
    """

    nodes: tuple[int, ...]
    units: tuple[TiedUnit, ...]


def tied_calls(
    graph: Graph, batch: int, values: Sequence[Any], moved: Sequence[Sequence[Any]], tolerance: float
) -> tuple[TiedCall, ...]:
    """Calls with tied entries that come apart when the parameters move, in topological order."""
    groups: dict[object, list[int]] = {}
    for node in graph.nodes:
        # Where no smooth pieces meet there is none to choose from.
        if is_tieable(graph, node, values) and kind_of(node) != "apex":
            groups.setdefault(call_of(node), []).append(node.index)
    found = []
    for members in groups.values():
        node = graph.nodes[members[0]]
        tied = moving(node, values, moved, tolerance)
        units = tuple(_units(node, batch, values, tied, tolerance))
        if units:
            found.append(TiedCall(tuple(members), units))
    return tuple(sorted(found, key=lambda call: call.nodes[0]))


def call_of(node: Node) -> tuple[object, ...]:
    """What tells one call from another: its values and its indices are one call; a least and a greatest value are two."""
    return node.op, node.args, node.kwargs, is_smallest(node)


def quantities(node: Node, values: Sequence[Any], entries: tuple[int, ...]) -> Tensor:
    """The quantity whose sign decides: an input less its kink, or the difference of two values."""
    kind = kind_of(node)
    if kind in ("compare", "operand"):
        given = operands(node, values)
        first, second, entry = entries
        return given[first].reshape(-1)[entry] - given[second].reshape(-1)[entry]
    x = _input(node, values)
    if kind == "place":
        return x.reshape(-1)[entries[0]]
    flat = competing(node, x).reshape(-1) if kind == "winner" else x.reshape(-1)
    return flat[entries[0]] - flat[entries[1]]


def run_pattern(
    graph: Graph,
    parameters: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    constants: Mapping[int, Tensor],
    chosen: Mapping[int, Sequence[tuple[TiedUnit, Option]]],
    stop: int | None = None,
) -> list[Any]:
    """Every node's value up to ``stop``, tied units taken as chosen, by node index; the others are evaluated as they are."""
    values = leaves(graph, parameters, inputs, constants)
    for node in graph.nodes[:stop]:
        if node.kind in ("op", "size"):
            values[node.index] = (
                _piece(node, values, chosen[node.index]) if node.index in chosen else evaluate(node, values)
            )
    return values


def _units(node: Node, batch: int, values: Sequence[Any], tied: Tensor, tolerance: float) -> list[TiedUnit]:
    kind = kind_of(node)
    entries = tied.nonzero().reshape(-1).tolist()
    if not entries:
        return []
    if kind == "order":
        return _orders(node, batch, values, set(entries), tolerance)
    x = _input(node, values).detach()
    close = closeness([x], tolerance)
    near = tied_candidates(node, x, close) if kind == "winner" else x.new_zeros(0)
    made = []
    for entry in entries:
        if kind == "place":
            options = _sides(float(nearest_places(node, x.reshape(-1)[entry])), entry)
        elif kind == "compare":
            options = _comparisons(node, entry)
        elif kind == "operand":
            options = _operand_options(node, values, entry)
        else:
            options = _winners(node, x, near[entry], entry)
        place = float(nearest_places(node, x.reshape(-1)[entry])) if kind == "place" else math.nan
        made.append(TiedUnit(batch, node.name, node.op, entry, options, place))
    return made


def _sides(place: float, entry: int) -> tuple[Option, ...]:
    return (
        Option(f"below {place:g}", ((-1.0, (entry,)),), (-1,)),
        Option(f"above {place:g}", ((1.0, (entry,)),), (1,)),
    )


def _comparisons(node: Node, entry: int) -> tuple[Option, ...]:
    if node.op.split(".")[1] in ("eq", "ne"):
        # Values that are equal at a point only: they differ on either side.
        return (Option("different", (), (0,)),)
    return (Option("greater", ((1.0, (0, 1, entry)),), (1,)), Option("less", ((-1.0, (0, 1, entry)),), (-1,)))


def _operand_options(node: Node, values: Sequence[Any], entry: int) -> tuple[Option, ...]:
    given = [float(operand.detach().reshape(-1)[entry]) for operand in operands(node, values)]
    name = node.op.split(".")[1]
    first, second, smallest = 0, 1, name in ("minimum", "fmin", "min", "clamp_max")
    if name == "clamp":
        # Of two bounds one is tied: above the lower bound the value itself is taken, or below the upper one.
        second = min(range(1, len(given)), key=lambda place: abs(given[place] - given[0]))
        smallest = second == 2 or (len(given) == 2 and dict(enumerate(node.args)).get(1) is None)
    sign = -1.0 if smallest else 1.0
    return (
        Option(f"operand {first}", ((sign, (first, second, entry)),), (first,)),
        Option(f"operand {second}", ((-sign, (first, second, entry)),), (second,)),
    )


def _winners(node: Node, x: Tensor, near: Tensor, entry: int) -> tuple[Option, ...]:
    rivals = candidates(node, x.shape)[entry][near.cpu()].tolist()
    sign = -1.0 if is_smallest(node) else 1.0
    return tuple(
        Option(f"entry {winner}", tuple((sign, (winner, other)) for other in rivals if other != winner), (winner,))
        for winner in rivals
    )


def _orders(node: Node, batch: int, values: Sequence[Any], tied: set[int], tolerance: float) -> list[TiedUnit]:
    x = _input(node, values).detach()
    flat, made = x.reshape(-1), []
    close = closeness([x], tolerance)
    for line in line_of(node, x.shape).tolist():
        ordered = sorted((entry for entry in line if entry in tied), key=lambda entry: float(flat[entry]))
        cluster: list[int] = []
        for entry in [*ordered, -1]:
            if cluster and (entry < 0 or float(flat[entry] - flat[cluster[-1]]) > close):
                if len(cluster) > 1:
                    made.append(TiedUnit(batch, node.name, node.op, min(cluster), _permutations(node, sorted(cluster))))
                cluster = []
            cluster.append(entry)
    return made


def _permutations(node: Node, cluster: list[int]) -> tuple[Option, ...]:
    if len(cluster) > MAX_CLUSTER:
        raise ProblemError(
            f"{len(cluster)} entries are equal at {node.name} ({node.op}), which have {math.factorial(len(cluster)):,} orders; at "
            f"most {MAX_CLUSTER} are told apart. Move the parameters a little, or take fewer samples."
        )
    return tuple(
        Option(
            "order " + " < ".join(map(str, order)),
            tuple((1.0, (high, low)) for low, high in itertools.pairwise(order)),
            order,
        )
        for order in itertools.permutations(cluster)
    )


def _piece(node: Node, values: Sequence[Any], chosen: Sequence[tuple[TiedUnit, Option]]) -> Any:
    kind = kind_of(node)
    if kind in ("place", "order"):
        return _nudged(node, values, chosen, kind == "order")
    plain = evaluate(node, values)
    flat = plain.reshape(-1)
    index = torch.tensor([unit.entry for unit, _ in chosen], device=flat.device)
    picked = [option.choice[0] for _, option in chosen]
    if kind == "compare":
        taken = torch.tensor([_compared(node.op.split(".")[1], side) for side in picked], device=flat.device)
    elif kind == "operand":
        given = operands(node, values)
        taken = torch.stack(
            [given[side].reshape(-1)[unit.entry] for (unit, _), side in zip(chosen, picked, strict=True)]
        )
    elif flat.is_floating_point():
        taken = competing(node, _input(node, values)).reshape(-1)[torch.tensor(picked, device=flat.device)]
    else:
        shape = _input(node, values).shape
        taken = torch.tensor([position(node, shape, winner) for winner in picked], device=flat.device)
    return flat.index_put((index,), taken.to(flat.dtype)).reshape(plain.shape)


def _compared(name: str, side: int) -> bool:
    """What a comparison says where the first value is greater (side 1), less (-1) or merely different (0)."""
    if side == 0:
        return name == "ne"
    return (side > 0) == (name in ("gt", "ge"))


def _nudged(node: Node, values: Sequence[Any], chosen: Sequence[tuple[TiedUnit, Option]], ordered: bool) -> Any:
    """The operation beside its kinks, on the chosen sides, continued from there to where the input is.

    ``f(x + shift) - f'(x + shift) shift``: its derivatives are those of the piece, and so is its value, which differs from the
    operation's own where that jumps.
    """
    x = _input(node, values)
    flat = x.detach().reshape(-1)
    scale = max(1.0, float(flat[torch.isfinite(flat)].abs().max()))
    beside = flat.clone()
    units = torch.tensor([unit.entry for unit, _ in chosen], device=flat.device)
    if ordered:
        for _, option in chosen:
            entries = torch.tensor(option.choice, device=flat.device)
            ranks = torch.arange(len(entries), dtype=flat.dtype, device=flat.device) - 0.5 * (len(entries) - 1)
            beside[entries] = flat[entries].mean() + scale * STEP * ranks
    else:
        sides = torch.tensor([option.choice[0] for _, option in chosen], dtype=flat.dtype, device=flat.device)
        beside[units] = flat.new_tensor([unit.place for unit, _ in chosen]) + sides * scale * STEP
    shift = (beside - flat).nan_to_num(0.0).reshape(x.shape)
    piece = _beside(node, values, x + shift)
    if not piece.is_floating_point():
        return piece
    return piece - _slope_along(node, values, x.detach() + shift, shift)


def _beside(node: Node, values: Sequence[Any], x: Tensor) -> Any:
    held = list(values)
    held[_input_place(node, values)] = x
    return evaluate(node, held)


def _slope_along(node: Node, values: Sequence[Any], x: Tensor, direction: Tensor) -> Tensor:
    """``f'(x) direction``, by differentiating the reverse mode's linear map: not every operation has a forward mode."""
    with torch.enable_grad():
        start = x.clone().requires_grad_()
        fixed = [value.detach() if isinstance(value, Tensor) else value for value in values]
        value = _beside(node, fixed, start)
        weights = torch.zeros_like(value, requires_grad=True)
        (pulled,) = torch.autograd.grad(value, start, weights, create_graph=True, materialize_grads=True)
        if not pulled.requires_grad:
            return torch.zeros_like(value).detach()
        (along,) = torch.autograd.grad(pulled, weights, direction, materialize_grads=True)
    return along.detach()


def _input_place(node: Node, values: Sequence[Any]) -> int:
    first: Ref = node.args[0]
    return first.node


def _input(node: Node, values: Sequence[Any]) -> Tensor:
    value: Tensor = values[_input_place(node, values)]
    return value
