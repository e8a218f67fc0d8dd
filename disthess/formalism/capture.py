"""Any captured problem as a `Dag`: one node per operation, the whole batch one value, the weighted objective last."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from disthess.errors import PlanError
from disthess.formalism.dag import Dag, DagNode
from disthess.graph.ir import Graph, Node
from disthess.graph.program import Program, build_programs
from disthess.graph.run import evaluate, run_graph
from disthess.problem import Problem, batch_tensors

MAX_PARAMETERS = 1000
"""Parameters a dense treatment is offered for."""

MAX_ENTRIES = 4000
"""Entries of all nodes together, likewise."""


def dag_of(problem: Problem) -> Dag:
    """Capture a problem and see it as the paper does, in float64, all trainable parameters.

    Samples are stacked, so that coupled ones need no special case. Several batches become parallel branches.

    Args:
        problem: A small one.

    Returns:
        A network whose last node is L itself.

    Raises:
        GraphError: It cannot be captured.
        PlanError: It is too large to be treated densely.
    """
    bound = problem.to(torch.float64)
    parameters = {parameter.name: parameter.tensor.detach() for parameter in bound.parameters()}
    programs = build_programs(bound, frozenset(parameters))
    numel = sum(tensor.numel() for tensor in parameters.values())
    nodes: list[DagNode] = []
    losses: list[str] = []
    for number, program in enumerate(programs):
        prefix = f"batch{number}/" if len(programs) > 1 else ""
        inputs = batch_tensors(bound.batches[number])
        values = run_graph(program.graph, parameters, inputs, program.constants)
        _check_size(program, values, numel)
        nodes.extend(_node(program.graph, node, values, prefix) for node in program.graph.nodes if _is_live(node))
        losses.append(prefix + program.graph.nodes[program.graph.loss].name)
    decayed = {name: value for name, value in bound.weight_decay.items() if value}
    nodes.append(DagNode("L", tuple(losses), tuple(decayed), _total(bound.weights, tuple(decayed.values())), False))
    return Dag(tuple(nodes), parameters)


def _is_live(node: Node) -> bool:
    return node.kind == "op" and node.live


def _node(graph: Graph, node: Node, values: Sequence[Any], prefix: str) -> DagNode:
    refs = list(dict.fromkeys(node.refs()))
    parents = [ref for ref in refs if _is_live(graph.nodes[ref])]
    leaves = [ref for ref in refs if graph.nodes[ref].kind == "use" and graph.nodes[ref].live]
    names = tuple(prefix + graph.nodes[ref].name for ref in parents)
    parameters = tuple(graph.nodes[ref].op for ref in leaves)
    return DagNode(prefix + node.name, names, parameters, _function(node, values, (*parents, *leaves)), node.in_model)


def _function(node: Node, values: Sequence[Any], places: Sequence[int]) -> Callable[..., Tensor]:
    needed = {ref: values[ref] for ref in node.refs()}

    def run(*arguments: Tensor) -> Tensor:
        held: Mapping[int, Any] = {**needed, **dict(zip(places, arguments, strict=True))}
        return evaluate(node, held)  # type: ignore[arg-type]

    return run


def _total(weights: Sequence[float], decay: Sequence[float]) -> Callable[..., Tensor]:
    def run(*arguments: Tensor) -> Tensor:
        losses, tensors = arguments[: len(weights)], arguments[len(weights) :]
        data = [weight * loss.reshape(()) for weight, loss in zip(weights, losses, strict=True)]
        penalty = [0.5 * value * tensor.square().sum() for value, tensor in zip(decay, tensors, strict=True)]
        return torch.stack([*data, *penalty]).sum()

    return run


def _check_size(program: Program, values: Sequence[Any], numel: int) -> None:
    entries = sum(values[node.index].numel() for node in program.graph.nodes if _is_live(node))
    if numel > MAX_PARAMETERS or entries > MAX_ENTRIES:
        raise PlanError(
            f"the formalism is dense and meant for small networks: at most {MAX_PARAMETERS:,} parameters and {MAX_ENTRIES:,} "
            f"entries of all nodes, and this problem has {numel:,} and {entries:,}. Use disthess.compute, which gives the same "
            "numbers, or fewer samples."
        )
