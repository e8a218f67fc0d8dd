"""Captured programs of a problem: one graph per shape of batch, with the tensors it holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from disthess.errors import GraphError
from disthess.graph.capture import capture
from disthess.graph.coupling import decide_independence, independence_by_structure
from disthess.graph.ir import Graph
from disthess.graph.run import run_graph
from disthess.problem import Problem, batch_tensors


@dataclass(frozen=True, slots=True)
class Program:
    """A graph and its constants.

    Attributes:
        graph: The captured objective.
        constants: Buffers and literal tensors by node index.
    """

    graph: Graph
    constants: Mapping[int, Tensor]


def on_device(program: Program, device: torch.device) -> Program:
    """The same program with its tensors, and the devices its operations name, moved."""
    graph = _graph_on(program.graph, device)
    return Program(graph, {index: value.to(device) for index, value in program.constants.items()})


def _graph_on(graph: Graph, device: torch.device) -> Graph:
    nodes = tuple(
        dataclasses.replace(node, args=_moved(node.args, device), kwargs=_moved(node.kwargs, device))
        for node in graph.nodes
    )
    return dataclasses.replace(graph, nodes=nodes)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.device):
        return device
    return tuple(_moved(entry, device) for entry in value) if isinstance(value, tuple) else value


def build_programs(problem: Problem, selected: frozenset[str], activations: Sequence[str] = ()) -> tuple[Program, ...]:
    """One program per batch, shared between batches of the same shape (any batch size where that is dynamic).

    Args:
        problem: In the dtype and on the device wanted. One without values (on the meta device) is captured by shapes, as it would
            be on the CPU; whether its samples are independent is then decided by structure alone, and no value is checked.
        selected: First names of the parameters whose Hessian is wanted.
        activations: Names or globs of the nodes and modules whose activation Hessian is wanted.

    Returns:
        In the order of ``problem.batches``.

    Raises:
        GraphError: A batch cannot be captured, or a captured graph does not reproduce the eager objective.
        ConfigError: An activation is not known.
    """
    values = not problem.without_values
    parameters = {parameter.name: parameter.tensor for parameter in problem.parameters()}
    found: dict[tuple[object, ...], Program] = {}
    programs = []
    for index, batch in enumerate(problem.batches):
        inputs = batch_tensors(batch)
        loose = tuple((tuple(tensor.shape[1:]), tensor.ndim, tensor.dtype) for tensor in inputs)
        exact = tuple((tuple(tensor.shape), tensor.dtype) for tensor in inputs)
        program = found.get(exact) or (found.get(loose) if inputs and inputs[0].ndim and len(inputs[0]) > 1 else None)
        if program is None:
            taken = capture(problem, batch, selected, activations)
            if values:
                graph = decide_independence(taken.graph, parameters, inputs, taken.constants, taken.note)
            else:
                graph = independence_by_structure(_graph_on(taken.graph, torch.device("cpu")), taken.note)
            program = Program(graph, taken.constants)
            found[exact] = program
            if graph.dynamic:
                found[loose] = program
        if values:
            _check_value(problem, index, program, parameters, inputs)
        programs.append(program)
    return tuple(programs)


def rounds_inside(graph: Graph) -> str:
    """Name of a live node that is float32, or empty: in a float64 problem, a place where the model itself casts down."""
    return next((node.name for node in graph.nodes if node.live and node.dtype == "float32"), "")


def _check_value(
    problem: Problem, index: int, program: Program, parameters: Mapping[str, Tensor], inputs: list[Tensor]
) -> None:
    with torch.no_grad():
        eager = float(problem.value(problem.batches[index]))
        captured = float(run_graph(program.graph, parameters, inputs, program.constants)[program.graph.loss])
    exact = problem.dtype == torch.float64 and not rounds_inside(program.graph)
    tolerance = 1e-9 if exact else 1e-4
    if abs(eager - captured) > tolerance * max(1.0, abs(eager)):
        raise GraphError(
            f"on batch {index} the captured graph gives {captured:.9g} and the model itself {eager:.9g}: the model depends on "
            "something export does not see (Python state, randomness, the batch's values). Make it a function of its inputs, "
            "or use method='autograd'."
        )
