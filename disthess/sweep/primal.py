"""Values and first-order cotangents of every node, once per batch.

``delta_v = dL/df_v`` comes from autograd's ordinary reverse mode on the graph's own nodes, with the batch's weight and the
loss's own ``1/N`` in it. First order is where autograd is reliable; everything second-order is done by rules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from disthess.errors import GraphError, ProblemError
from disthess.graph.ir import Graph
from disthess.graph.program import Program
from disthess.graph.run import evaluate, leaves
from disthess.problem import Problem, batch_tensors


@dataclass(frozen=True, slots=True)
class Primal:
    """One batch's primal point.

    Attributes:
        graph: The graph it was computed on.
        values: Value of each node: tensors, integers for sizes.
        deltas: ``dL/df`` of each live node (same shape as its value), None where it is zero.
        samples: Number of samples told apart (1 if they are coupled).
        loss: The batch's weighted objective.
    """

    graph: Graph
    values: tuple[Any, ...]
    deltas: tuple[Tensor | None, ...]
    samples: int
    loss: float


def compute_primal(
    graph: Graph,
    parameters: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    constants: Mapping[int, Tensor],
    weight: float,
) -> Primal:
    """Run the graph forward and back once.

    Args:
        graph: The captured objective.
        parameters: Values by first name.
        inputs: The batch's tensors in tree order.
        constants: Buffers and literals by node index.
        weight: The batch's weight in L; it is part of every delta.

    Returns:
        Detached values and deltas.

    Raises:
        ProblemError: A value on the way is NaN or infinite where the loss depends on it.
        GraphError: torch has no derivative of a captured operation.
    """
    values = leaves(graph, parameters, inputs, constants)
    with torch.enable_grad():
        for node in graph.nodes:
            if node.kind == "use" and node.live:
                values[node.index] = values[node.index].detach().requires_grad_()
            elif node.kind in ("op", "size"):
                values[node.index] = evaluate(node, values)
            if node.asked and not values[node.index].requires_grad:
                # An activation before every parameter asked for: derivatives start at it.
                values[node.index] = values[node.index].detach().requires_grad_()
        live = [node.index for node in graph.nodes if node.live and values[node.index].requires_grad]
        loss = weight * values[graph.loss]
        try:
            found = torch.autograd.grad(loss, [values[index] for index in live], allow_unused=True)
        except (RuntimeError, NotImplementedError) as reason:
            text = " ".join(str(reason).split())
            raise GraphError(f"torch cannot differentiate the captured operations ({text[:200]}).") from reason
    deltas: list[Tensor | None] = [None] * len(graph.nodes)
    for index, delta in zip(live, found, strict=True):
        deltas[index] = None if delta is None else delta.detach()
    if not bool(torch.isfinite(loss)):
        raise ProblemError(f"the objective is {float(loss.detach())}; check the data and the weights for overflow.")
    detached = tuple(value.detach() if isinstance(value, Tensor) else value for value in values)
    return Primal(graph, detached, tuple(deltas), _samples(graph, inputs), float(loss.detach()))


def compute_primals(problem: Problem, programs: Sequence[Program]) -> list[Primal]:
    """The primal point of every batch of a problem, at its parameters as they are.

    Raises:
        ProblemError: As `compute_primal`.
        GraphError: As `compute_primal`.
    """
    tensors = {parameter.name: parameter.tensor for parameter in problem.parameters()}
    return [
        compute_primal(program.graph, tensors, batch_tensors(batch), program.constants, weight)
        for program, batch, weight in zip(programs, problem.batches, problem.weights, strict=True)
    ]


def _samples(graph: Graph, inputs: Sequence[Tensor]) -> int:
    if not graph.independent:
        return 1
    for node in graph.nodes:
        if node.kind == "input" and node.batch is not None:
            return int(inputs[int(node.op)].shape[node.batch.dim]) // node.batch.rows_per_sample
    return graph.samples
