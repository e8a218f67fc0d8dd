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
from disthess.formalism.kinks import is_tieable, kind_of, moving, operands, places, tied_candidates
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
    """

    batch: int
    node: str
    op: str
    entry: int
    options: tuple[Option, ...]


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
        if is_tieable(graph, node, values):
            groups.setdefault((node.op, node.args, node.kwargs), []).append(node.index)
    found = []
    for members in groups.values():
        node = graph.nodes[members[0]]
        tied = moving(node, values, moved, tolerance)
        units = tuple(_units(node, batch, values, tied, tolerance))
        if units:
            found.append(TiedCall(tuple(members), units))
    return tuple(sorted(found, key=lambda call: call.nodes[0]))


def quantities(node: Node, values: Sequence[Any], entries: tuple[int, ...]) -> Tensor:
    """The quantity whose sign decides: an input less its kink, or the difference of two values."""
    kind = kind_of(node.op)
    if kind in ("compare", "operand"):
        given = operands(node, values)
        first, second, entry = entries
        return given[first].reshape(-1)[entry] - given[second].reshape(-1)[entry]
    flat = _input(node, values).reshape(-1)
    if kind == "place":
        return flat[entries[0]]
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
    kind = kind_of(node.op)
    entries = tied.nonzero().reshape(-1).tolist()
    if not entries:
        return []
    if kind == "order":
        return _orders(node, batch, values, set(entries), tolerance)
    x = _input(node, values).detach()
    close = tolerance * (float(x.abs().max()) or 1.0)
    near = tied_candidates(node, x, close) if kind == "winner" else x.new_zeros(0)
    made = []
    for entry in entries:
        if kind == "place":
            options = _sides(node, float(x.reshape(-1)[entry]), entry)
        elif kind == "compare":
            options = (
                Option("greater", ((1.0, (0, 1, entry)),), (1,)),
                Option("less", ((-1.0, (0, 1, entry)),), (-1,)),
            )
        elif kind == "operand":
            options = _operand_options(node, values, entry, tolerance)
        else:
            options = _winners(node, x, near[entry], entry)
        made.append(TiedUnit(batch, node.name, node.op, entry, options))
    return made


def _sides(node: Node, value: float, entry: int) -> tuple[Option, ...]:
    place = min(places(node), key=lambda kink: abs(kink - value))
    return (
        Option(f"below {place:g}", ((-1.0, (entry,)),), (-1,)),
        Option(f"above {place:g}", ((1.0, (entry,)),), (1,)),
    )


def _operand_options(node: Node, values: Sequence[Any], entry: int, tolerance: float) -> tuple[Option, ...]:
    given = [float(operand.detach().reshape(-1)[entry]) for operand in operands(node, values)]
    smallest = "min" in node.op
    if node.op == "aten.clamp.Tensor":
        # Of two bounds one is tied: above the lower bound the value itself is taken, or below the upper one.
        bound = min(range(1, len(given)), key=lambda place: abs(given[place] - given[0]))
        upper = bound == 2 or node.args[1] is None
        rivals, smallest = (0, bound), upper
    else:
        rivals = (0, 1)
    sign = -1.0 if smallest else 1.0
    first, second = rivals
    return (
        Option(f"operand {first}", ((sign, (first, second, entry)),), (first,)),
        Option(f"operand {second}", ((-sign, (first, second, entry)),), (second,)),
    )


def _winners(node: Node, x: Tensor, near: Tensor, entry: int) -> tuple[Option, ...]:
    rivals = candidates(node, x.shape)[entry][near.cpu()].tolist()
    sign = -1.0 if ".min" in node.op or ".amin" in node.op or ".argmin" in node.op else 1.0
    return tuple(
        Option(f"entry {winner}", tuple((sign, (winner, other)) for other in rivals if other != winner), (winner,))
        for winner in rivals
    )


def _orders(node: Node, batch: int, values: Sequence[Any], tied: set[int], tolerance: float) -> list[TiedUnit]:
    x = _input(node, values).detach()
    flat, made = x.reshape(-1), []
    close = tolerance * (float(x.abs().max()) or 1.0)
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
    kind = kind_of(node.op)
    if kind in ("place", "order"):
        return _nudged(node, values, chosen, kind == "order")
    plain = evaluate(node, values)
    flat = plain.reshape(-1)
    index = torch.tensor([unit.entry for unit, _ in chosen], device=flat.device)
    picked = [option.choice[0] for _, option in chosen]
    if kind == "compare":
        greater = node.op.split(".")[1] in ("gt", "ge")
        taken = torch.tensor([(side > 0) == greater for side in picked], device=flat.device)
    elif kind == "operand":
        given = operands(node, values)
        taken = torch.stack(
            [given[side].reshape(-1)[unit.entry] for (unit, _), side in zip(chosen, picked, strict=True)]
        )
    elif flat.is_floating_point():
        taken = _input(node, values).reshape(-1)[torch.tensor(picked, device=flat.device)]
    else:
        shape = _input(node, values).shape
        taken = torch.tensor([position(node, shape, winner) for winner in picked], device=flat.device)
    return flat.index_put((index,), taken.to(flat.dtype)).reshape(plain.shape)


def _nudged(node: Node, values: Sequence[Any], chosen: Sequence[tuple[TiedUnit, Option]], ordered: bool) -> Any:
    """The operation beside its kinks, on the chosen sides: its derivatives there, with the value that it has at the kinks."""
    x = _input(node, values)
    flat = x.detach().reshape(-1)
    scale = max(1.0, float(flat.abs().max()))
    beside = flat.clone()
    for unit, option in chosen:
        if ordered:
            middle = float(flat[list(option.choice)].mean())
            for rank, entry in enumerate(option.choice):
                beside[entry] = middle + scale * STEP * (rank - 0.5 * (len(option.choice) - 1))
        else:
            place = min(places(node), key=lambda kink: abs(kink - float(flat[unit.entry])))
            beside[unit.entry] = place + option.choice[0] * scale * STEP
    shift = (beside - flat).reshape(x.shape)
    held = list(values)
    where = _input_place(node, values)
    held[where] = x + shift
    piece = evaluate(node, held)
    if not piece.is_floating_point():
        return piece
    with torch.no_grad():
        correction = evaluate(node, values) - piece
    return piece + correction


def _input_place(node: Node, values: Sequence[Any]) -> int:
    first: Ref = node.args[0]
    return first.node


def _input(node: Node, values: Sequence[Any]) -> Tensor:
    value: Tensor = values[_input_place(node, values)]
    return value
