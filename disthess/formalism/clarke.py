"""The Hessian at a kink: a set of matrices, one for each smooth piece that meets there, and its smallest convex combination.

At a point where relus, maxima or comparisons are tied, the objective is several smooth functions f_s, each valid on one side. With
``B = {hess f_s}`` over the pieces that can be reached,

    H* = argmin { |M|_F : M in co B } = sum_s t_s hess f_s,   t = argmin t^T G t,   G[s, r] = <hess f_s, hess f_r>_F.

One joint t serves all blocks: minimising block by block (as the paper's Definition 6 does) can leave the set. Where all first
derivatives agree by construction co B is Clarke's generalised Hessian; where they jump it is only the set of limits, and the part
of the curvature that sits on the kink itself (a delta function) is in none of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from disthess.errors import ConfigError, PlanError, ProblemError
from disthess.formalism.kinks import kind_of
from disthess.formalism.patterns import Pattern, PatternSearch, Realised
from disthess.formalism.ties import TiedUnit
from disthess.graph.ir import Graph, Node, Ref
from disthess.graph.program import Program
from disthess.linalg.minnorm import min_norm_weights
from disthess.problem import Problem
from disthess.units import human_bytes

Element = Literal["min_norm", "b", "torch"]
ELEMENTS: tuple[Element, ...] = ("min_norm", "b", "torch")

_ONCE_SMOOTH = frozenset({"aten.celu.default"})
_SQUARES = frozenset({"aten.square.default"})
_ZERO_AT_KINK = frozenset(
    {"aten.relu.default", "aten.abs.default", "aten.leaky_relu.default", "aten.clamp_min.default"}
)


JUMP = 1e-7
"""Difference of two pieces' values, relative to the largest, from which on an objective counts as discontinuous."""


@dataclass(frozen=True, slots=True)
class ClarkeHessian:
    """The set of Hessians at a point, and one element of it.

    Attributes:
        matrix: The element asked for, ``[P, P]``, in ``named_parameters()`` order and the objective's own scale.
        element: ``min_norm``: the one of least Frobenius norm in the convex hull; ``b``: the Hessian of one smooth piece, the
            nearest to torch's own (the smallest where torch has none); ``torch``: what autograd gives, in the set or not.
        patterns: The realisable patterns.
        hessians: Hessian of each pattern's smooth extension, ``[m, P, P]``.
        gradients: Its gradient, ``[m, P]``.
        weights: ``t`` of the least-norm element, ``[m]``.
        grad_jump: Largest difference of two of the gradients, Euclidean. 0 alone does not make a function smooth.
        value_jump: Largest difference of two pieces' values: 0 (up to rounding and ``tol``) for a continuous objective.
        stationarity: ``dist(0, co {grad f_s})``: 0 at a nonsmooth stationary point.
        torch_distance: Frobenius distance of torch's own Hessian from the set; NaN where torch has none.
        first_order: Whether realisability rests on first derivatives where they leave something open (see `Realised`).
        label: ``smooth`` (nothing is tied), ``clarke`` (every tied operation has a Lipschitz gradient, so this is Clarke's set),
            ``piecewise`` (only the set of limits) or ``discontinuous`` (the objective itself jumps, as with signs and counts).
        units: Tied units.
        possible: Patterns there would be if all combinations could be realised.
        names: Parameters, in order.
        sizes: Entries of each.
    """

    matrix: np.ndarray
    element: Element
    patterns: tuple[Pattern, ...]
    hessians: np.ndarray
    gradients: np.ndarray
    weights: np.ndarray
    grad_jump: float
    value_jump: float
    stationarity: float
    torch_distance: float
    first_order: bool
    label: str
    units: tuple[TiedUnit, ...]
    possible: int
    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def block(self, a: str, b: str) -> np.ndarray:
        """The block of two parameters of ``matrix``.

        Raises:
            ConfigError: There is no such parameter.
        """
        return self.matrix[self._range(a), self._range(b)]

    def spread(self, a: str | None = None, b: str | None = None) -> float:
        """How much a block (or the whole matrix) moves over the set: the largest Frobenius distance of two elements.

        It is attained at two patterns, since a convex function on a hull is largest at its corners.

        Raises:
            ConfigError: There is no such parameter.
        """
        rows = slice(None) if a is None else self._range(a)
        columns = slice(None) if b is None and a is None else self._range(b if b is not None else str(a))
        return _diameter(self.hessians[:, rows, columns].reshape(len(self.hessians), -1))

    def describe(self) -> str:
        """What was found, in a few lines."""
        count = len(self.patterns)
        lines = [
            f"{len(self.units)} ties, {count} of {self.possible:,} patterns can be realised ({self.label})",
            f"element {self.element}, Frobenius norm {np.linalg.norm(self.matrix):.6g}; the set's diameter is {self.spread():.6g}",
            f"gradient jumps by {self.grad_jump:.6g}; distance of 0 from the hull of gradients {self.stationarity:.6g}",
            f"torch's own Hessian lies {self.torch_distance:.6g} from the set",
        ]
        if self.label == "discontinuous":
            lines.append(
                f"the objective itself jumps by {self.value_jump:.6g} here: no element stands for its curvature"
            )
        if self.first_order:
            lines.append("first order: a cusp could hide a pattern, or a flat tie add one")
        return "\n".join(lines)

    def _range(self, name: str) -> slice:
        if name not in self.names:
            raise ConfigError(f"no parameter {name!r}; there are {', '.join(self.names)}.")
        place = self.names.index(name)
        start = sum(self.sizes[:place])
        return slice(start, start + self.sizes[place])


def combine(
    problem: Problem,
    programs: Sequence[Program],
    tensors: Mapping[str, Tensor],
    torch_hessian: np.ndarray | None,
    element: Element,
    tolerance: float,
    max_patterns: int,
    available_bytes: int,
) -> ClarkeHessian:
    """Find the patterns, their Hessians, and the element asked for.

    Args:
        problem: In float64.
        programs: Its captured batches.
        tensors: Parameters whose Hessian is wanted.
        torch_hessian: What autograd gives on the eager model, ``[P, P]``; None where it gives none.
        element: See `ClarkeHessian`.
        tolerance: How close to a kink counts as tied, relative.
        max_patterns: More are refused.
        available_bytes: Memory that may be used.

    Raises:
        ProblemError: Too many patterns, or a piece whose Hessian is not finite.
        PlanError: They do not fit in memory.
    """
    search = PatternSearch(problem, programs, tensors)
    realised = search.run(tolerance, max_patterns)
    numel = sum(tensor.numel() for tensor in tensors.values())
    needed = 8 * numel * numel * (2 * len(realised.patterns) + 2)
    if needed > available_bytes:
        raise PlanError(
            f"{len(realised.patterns)} Hessians of {numel:,} parameters need {human_bytes(needed)} and "
            f"{human_bytes(available_bytes)} are available. Select fewer parameters."
        )
    pairs = [_derivatives(search, pattern, tensors) for pattern in realised.patterns]
    values = np.array([pair[0] for pair in pairs])
    gradients, hessians = np.stack([pair[1] for pair in pairs]), np.stack([pair[2] for pair in pairs])
    jump = float(values.max() - values.min())
    flat = hessians.reshape(len(hessians), -1)
    weights = min_norm_weights(flat @ flat.T)
    away = flat if torch_hessian is None else flat - torch_hessian.reshape(1, -1)
    matrix = np.tensordot(weights, hessians, axes=1)
    if element == "b":
        matrix = hessians[int(np.argmin(np.linalg.norm(away, axis=1)))]
    elif element == "torch":
        if torch_hessian is None:
            raise ProblemError("torch cannot differentiate the eager objective twice; choose another element.")
        matrix = torch_hessian
    return ClarkeHessian(
        matrix=matrix,
        element=element,
        patterns=realised.patterns,
        hessians=hessians,
        gradients=gradients,
        weights=weights,
        grad_jump=_diameter(gradients),
        value_jump=jump,
        stationarity=_distance(gradients),
        torch_distance=math.nan if torch_hessian is None else _distance(away),
        first_order=realised.first_order,
        # Pieces are continued to the point itself, which a tie within the tolerance may be a little off.
        label="discontinuous"
        if jump > max(JUMP, 100 * tolerance) * max(1.0, float(np.abs(values).max()))
        else _label(realised, programs),
        units=realised.units,
        possible=realised.possible,
        names=tuple(tensors),
        sizes=tuple(tensor.numel() for tensor in tensors.values()),
    )


def _derivatives(
    search: PatternSearch, pattern: Pattern, tensors: Mapping[str, Tensor]
) -> tuple[float, np.ndarray, np.ndarray]:
    """Value, gradient ``[P]`` and Hessian ``[P, P]`` of a pattern's smooth extension."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    held = list(leaves.values())
    value = search.objective(pattern, leaves)
    numel = sum(tensor.numel() for tensor in held)
    if not value.requires_grad:
        return float(value), np.zeros(numel), np.zeros((numel, numel))
    gradient = torch.cat(
        [entry.reshape(-1) for entry in torch.autograd.grad(value, held, create_graph=True, materialize_grads=True)]
    )
    rows = np.zeros((numel, numel))
    if gradient.requires_grad:
        for index in range(numel):
            row = torch.autograd.grad(gradient[index], held, retain_graph=True, materialize_grads=True)
            rows[index] = torch.cat([entry.reshape(-1) for entry in row]).numpy()
    found = float(value.detach()), gradient.detach().numpy(), 0.5 * (rows + rows.T)
    if not (np.isfinite(found[1]).all() and np.isfinite(found[2]).all()):
        raise ProblemError(
            "the Hessian of a smooth piece is not finite: the objective is not piecewise smooth here (the Euclidean norm of 0, "
            "or the square root of 0, is no such function). Move the parameters a little, or add a small constant inside."
        )
    return found


def _label(realised: Realised, programs: Sequence[Program]) -> str:
    if not realised.units:
        return "smooth"
    for unit in realised.units:
        graph = programs[unit.batch].graph
        node = next(node for node in graph.nodes if node.name == unit.node)
        if not _is_once_smooth(graph, node):
            return "piecewise"
    return "clarke"


def _is_once_smooth(graph: Graph, node: Node) -> bool:
    """Whether an operation's gradient is Lipschitz: by its type, or because its value, 0 at the kink, is only ever squared."""
    if node.op in _ONCE_SMOOTH or (node.op == "aten.elu.default" and _unit_slope(node)):
        return True
    if node.op not in _ZERO_AT_KINK or kind_of(node) != "place":
        return False
    if node.op == "aten.clamp_min.default" and node.args[1] != 0:
        return False
    users = [other for other in graph.nodes if node.index in other.refs()]
    return bool(users) and all(_squares(user, node.index) for user in users)


def _unit_slope(node: Node) -> bool:
    given = [float(entry) for entry in node.args[1:]]
    alpha, scale, inner = given + [1.0, 1.0, 1.0][len(given) :]
    return alpha * inner == 1 and scale > 0


def _squares(user: Node, index: int) -> bool:
    if user.op in _SQUARES:
        return True
    if user.op == "aten.pow.Tensor_Scalar":
        return isinstance(user.args[1], (int, float)) and user.args[1] >= 2
    return user.op == "aten.mul.Tensor" and user.args[0] == user.args[1] == Ref(index)


def _distance(points: np.ndarray) -> float:
    """Distance of 0 from the hull of the rows."""
    weights = min_norm_weights(points @ points.T)
    return float(np.linalg.norm(weights @ points))


def _diameter(points: np.ndarray) -> float:
    best = 0.0
    for place, point in enumerate(points[:-1]):
        best = max(best, float(np.linalg.norm(points[place + 1 :] - point, axis=1).max()))
    return best
