"""Which activation patterns can be realised near a point, decided to first order along the graph.

A pattern fixes one smooth piece for every tied unit. It is realised if some direction d of the parameters makes every quantity
that its pieces need positive: ``R d > 0``, with a row of R for the gradient of each quantity *under the prefix of the pattern*.
By Gordan's theorem that is so exactly if 0 is not in the convex hull of the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from disthess.errors import ProblemError
from disthess.formalism.ties import Option, TiedCall, TiedUnit, call_of, quantities, run_pattern, tied_calls
from disthess.graph.program import Program
from disthess.graph.run import run_graph
from disthess.linalg.minnorm import min_norm_weights
from disthess.problem import Problem, batch_tensors

Choice = tuple[TiedUnit, Option]

HULL = 1e-10
"""Squared distance of 0 from the hull of unit rows below which it counts as inside."""

FLAT = 1e-10
"""Norm of a row, relative to the largest, below which its quantity does not move to first order."""

BEND_ROWS = 4000
"""Rows of second derivatives of flat quantities that are computed for one call; beyond, both of their pieces are kept."""

DIRECTIONS = 6
"""Random directions tried, both ways, to see whether a tie comes apart."""

SHIFT = 1e-3
"""How far the parameters are moved to see which ties come apart, relative to their magnitude."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """One realisable pattern.

    Attributes:
        choices: The piece of every tied unit.
        direction: A direction of the parameters along which the pattern is entered, ``[P]``, or None where every quantity is
            flat to first order.
    """

    choices: tuple[Choice, ...]
    direction: np.ndarray | None


@dataclass(frozen=True, slots=True)
class Realised:
    """All patterns found.

    Attributes:
        patterns: At least one.
        units: Every tied unit.
        possible: How many patterns there would be if all combinations could be realised.
        first_order: Whether the answer rests on first derivatives of quantities that are not linear in the parameters, where
            they leave something open: a cusp can hide a pattern, a flat quantity can add one.
    """

    patterns: tuple[Pattern, ...]
    units: tuple[TiedUnit, ...]
    possible: int
    first_order: bool


@dataclass(frozen=True, slots=True)
class _Row:
    """How a quantity moves with the parameters, under a prefix.

    Attributes:
        gradient: ``[P]``.
        linear: Whether it is linear in the parameters.
        bend: Where the gradient is 0: 1 if the quantity is convex (so that it is positive nearby, to second order), -1 if
            it is concave, 0 if neither, or not looked at.
    """

    gradient: np.ndarray
    linear: bool
    bend: int


@dataclass(frozen=True, slots=True)
class _Prefix:
    choices: tuple[Choice, ...]
    rows: np.ndarray
    all_linear: bool
    witness: np.ndarray | None


@final
class PatternSearch:
    """Breadth-first over the tied units, in topological order.

    Args:
        problem: In float64.
        programs: Its captured batches.
        tensors: Parameters to differentiate by; all others stay as they are.
    """

    def __init__(self, problem: Problem, programs: Sequence[Program], tensors: Mapping[str, Tensor]) -> None:
        self._problem = problem
        self._programs = programs
        self._tensors = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
        self._first_order = False

    def run(self, tolerance: float, max_patterns: int) -> Realised:
        """Find every realisable pattern.

        Args:
            tolerance: How close to a kink counts as tied, relative to the input's magnitude.
            max_patterns: More are refused.

        Raises:
            ProblemError: There are more patterns, with how many.
        """
        calls = [(batch, call) for batch in range(len(self._programs)) for call in self._calls(batch, tolerance)]
        units = tuple(unit for _, call in calls for unit in call.units)
        possible = 1
        for unit in units:
            possible *= len(unit.options)
        numel = sum(tensor.numel() for tensor in self._tensors.values())
        prefixes = [_Prefix((), np.zeros((0, numel)), True, None)]
        for batch, call in calls:
            grown: list[_Prefix] = []
            for prefix in prefixes:
                grown.extend(self._extend(batch, call, prefix, len(grown), max_patterns, possible, len(units)))
            prefixes = grown
        found = tuple(Pattern(prefix.choices, prefix.witness) for prefix in prefixes)
        return Realised(found, units, possible, self._first_order)

    def objective(self, pattern: Pattern, tensors: Mapping[str, Tensor]) -> Tensor:
        """The objective over all batches, weight decay included, with the pattern's pieces."""
        total: Any = 0.0
        for batch, weight in enumerate(self._problem.weights):
            program = self._programs[batch]
            values = self._values(batch, pattern.choices, tensors, None)
            total = total + weight * values[program.graph.loss].reshape(())
        for name, tensor in tensors.items():
            decay = self._problem.weight_decay.get(name, 0.0)
            if decay:
                total = total + 0.5 * decay * tensor.square().sum()
        result: Tensor = total
        return result

    def _calls(self, batch: int, tolerance: float) -> tuple[TiedCall, ...]:
        program = self._programs[batch]
        inputs = batch_tensors(self._problem.batches[batch])
        with torch.no_grad():
            values = run_graph(program.graph, self._tensors, inputs, program.constants)
            moved = [
                run_graph(program.graph, near, inputs, program.constants) for near in nearby(self._tensors, DIRECTIONS)
            ]
        return tied_calls(program.graph, batch, values, moved, tolerance)

    def _values(
        self, batch: int, choices: Sequence[Choice], tensors: Mapping[str, Tensor], stop: int | None
    ) -> list[Any]:
        program = self._programs[batch]
        chosen: dict[int, list[Choice]] = {}
        by_name = {node.name: node for node in program.graph.nodes}
        for unit, option in choices:
            if unit.batch == batch:
                first = by_name[unit.node]
                for node in program.graph.nodes:
                    if node.kind == "op" and call_of(node) == call_of(first):
                        chosen.setdefault(node.index, []).append((unit, option))
        inputs = batch_tensors(self._problem.batches[batch])
        return run_pattern(program.graph, tensors, inputs, program.constants, chosen, stop)

    def _extend(
        self, batch: int, call: TiedCall, prefix: _Prefix, others: int, most: int, possible: int, units: int
    ) -> list[_Prefix]:
        rows = self._rows(batch, call, prefix)
        found = [prefix]
        for number, unit in enumerate(call.units):
            grown = []
            for current in found:
                for option in unit.options:
                    longer = self._with_option(current, unit, option, rows)
                    if longer is not None:
                        grown.append(longer)
            found = grown
            if others + len(found) > most:
                done = f"after {number + 1} of {len(call.units)} ties at {call.units[0].node}"
                raise ProblemError(
                    f"more patterns than max_patterns={most:,} allows: at least {others + len(found):,} can be realised {done}, of "
                    f"at most {possible:,} over all {units} ties. Raise max_patterns, lower tol, move the parameters a little off "
                    "the kinks, or take fewer samples."
                )
        return found

    def _rows(self, batch: int, call: TiedCall, prefix: _Prefix) -> dict[tuple[int, ...], _Row]:
        """Every quantity of a call under a prefix."""
        values = self._values(batch, prefix.choices, self._tensors, call.nodes[0])
        node = self._programs[batch].graph.nodes[call.nodes[0]]
        leaves = list(self._tensors.values())
        step = {name: 0.1 * tensor.detach() + 0.01 for name, tensor in self._tensors.items()}
        with torch.no_grad():
            away = {name: tensor + step[name] for name, tensor in self._tensors.items()}
            far = self._values(batch, prefix.choices, away, call.nodes[0])
        flat_step = torch.cat([entry.reshape(-1) for entry in step.values()]).numpy()
        asked = {entries: quantities(node, values, entries) for entries in _asked(call)}
        slopes = {entries: _gradient(quantity, leaves) for entries, quantity in asked.items()}
        gradients = {entries: slope.detach().numpy() for entries, slope in slopes.items()}
        largest = max((float(np.linalg.norm(row)) for row in gradients.values()), default=0.0)
        flat = [entries for entries, row in gradients.items() if _is_flat(row, largest)]
        cheap = len(flat) * len(flat_step) <= BEND_ROWS
        found = {}
        for entries, row in gradients.items():
            change = float(quantities(node, far, entries) - asked[entries].detach())
            size = float(np.abs(row) @ np.abs(flat_step))
            linear = abs(change - float(row @ flat_step)) <= 1e-9 * max(size, abs(change), 1e-300)
            bend = _bend(slopes[entries], leaves) if cheap and entries in flat else 0
            found[entries] = _Row(row, linear, bend)
        return found

    def _with_option(
        self, prefix: _Prefix, unit: TiedUnit, option: Option, rows: Mapping[tuple[int, ...], _Row]
    ) -> _Prefix | None:
        largest = max((float(np.linalg.norm(row.gradient)) for row in rows.values()), default=0.0)
        held, linear = prefix.rows, prefix.all_linear
        for sign, entries in option.signs:
            row = rows[entries]
            if _is_flat(row.gradient, largest):
                # To first order the quantity does not say; to second order it may. Else both pieces are kept.
                self._first_order = True
                if row.bend * sign < 0:
                    return None
                continue
            unit_row = sign * row.gradient / float(np.linalg.norm(row.gradient))
            linear = linear and row.linear
            if not len(held) or float((held @ unit_row).max()) < 1 - 1e-12:
                held = np.concatenate([held, unit_row[None]])
        if held is prefix.rows:
            return _Prefix((*prefix.choices, (unit, option)), held, linear, prefix.witness)
        if prefix.witness is not None and bool((held @ prefix.witness > 1e-6 * np.linalg.norm(prefix.witness)).all()):
            return _Prefix((*prefix.choices, (unit, option)), held, linear, prefix.witness)
        weights = min_norm_weights(held @ held.T)
        witness = weights @ held
        if float(witness @ witness) <= HULL:
            self._first_order = self._first_order or not linear
            return None
        return _Prefix((*prefix.choices, (unit, option)), held, linear, witness)


def _asked(call: TiedCall) -> set[tuple[int, ...]]:
    return {entries for unit in call.units for option in unit.options for _, entries in option.signs}


def _is_flat(row: np.ndarray, largest: float) -> bool:
    length = float(np.linalg.norm(row))
    return length == 0.0 or length <= FLAT * largest


def _gradient(value: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """``d value / d theta``, flat ``[P]``, to be differentiated again."""
    if not value.requires_grad:
        return torch.cat([torch.zeros_like(leaf).reshape(-1) for leaf in leaves]).detach()
    parts = torch.autograd.grad(value, leaves, create_graph=True, materialize_grads=True)
    return torch.cat([part.reshape(-1) for part in parts])


def _bend(slope: Tensor, leaves: Sequence[Tensor]) -> int:
    """The sign of a Hessian that has one: 1 if it is positive semi-definite and not 0, -1 if negative, else 0."""
    if not slope.requires_grad:
        return 0
    rows = [torch.autograd.grad(entry, leaves, retain_graph=True, materialize_grads=True) for entry in slope]
    matrix = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows]).numpy()
    values = np.linalg.eigvalsh(0.5 * (matrix + matrix.T))
    edge = 1e-9 * float(np.abs(values).max())
    if edge == 0.0:
        return 0
    return 1 if values[0] >= -edge else -1 if values[-1] <= edge else 0


def nearby(tensors: Mapping[str, Tensor], directions: int = 1, shift: float = SHIFT) -> list[dict[str, Tensor]]:
    """The parameters moved along random directions, forwards and backwards."""
    generator = torch.Generator().manual_seed(0)
    moved = []
    for _ in range(directions):
        steps = {}
        for name, tensor in tensors.items():
            scale = float(tensor.detach().abs().max()) if tensor.numel() else 0.0
            noise = (
                torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype).to(tensor.device)
            )
            steps[name] = shift * (scale or 1.0) * noise
        for sign in (1.0, -1.0):
            moved.append({name: tensor.detach() + sign * steps[name] for name, tensor in tensors.items()})
    return moved
