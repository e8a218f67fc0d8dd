"""Evaluate single nodes, and a whole graph, on tensors."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from disthess.errors import GraphError
from disthess.graph.ir import Graph, Node, Ref

_PYTHON: Mapping[str, Callable[..., Any]] = {
    "mul": operator.mul,
    "add": operator.add,
    "sub": operator.sub,
    "floordiv": operator.floordiv,
    "truediv": operator.truediv,
    "mod": operator.mod,
    "pow": operator.pow,
    "neg": operator.neg,
    "getitem": operator.getitem,
    "sym_float": float,
    "sym_int": int,
    "sym_max": max,
    "sym_min": min,
    "sym_not": operator.not_,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


@lru_cache(maxsize=4096)
def operation(name: str) -> Callable[..., Any]:
    """The callable of an operation's name.

    Raises:
        GraphError: The name is not an operation of this build of torch.
    """
    space, _, rest = name.partition(".")
    if space == "python":
        if rest not in _PYTHON:
            raise GraphError(
                f"the graph computes a size by {rest!r}, which disthess does not know; use method='autograd'."
            )
        return _PYTHON[rest]
    packet, _, overload = rest.rpartition(".")
    try:
        return getattr(getattr(getattr(torch.ops, space), packet), overload)
    except AttributeError as reason:
        raise GraphError(f"operation {name} is not known to torch {torch.__version__}.") from reason


def resolve(value: Any, values: Sequence[Any]) -> Any:
    """Replace every `Ref` inside an argument by the node's value."""
    if isinstance(value, Ref):
        return values[value.node]
    if isinstance(value, tuple):
        return [resolve(entry, values) for entry in value]
    return value


def evaluate(node: Node, values: Sequence[Any]) -> Any:
    """The node's value from those of the nodes before it."""
    args = [resolve(value, values) for value in node.args]
    kwargs = {key: resolve(value, values) for key, value in node.kwargs}
    result = operation(node.op)(*args, **kwargs)
    return result if node.output is None else result[node.output]


def leaves(
    graph: Graph, parameters: Mapping[str, Tensor], inputs: Sequence[Tensor], constants: Mapping[int, Tensor]
) -> list[Any]:
    """A list with the value of every leaf at its index and None elsewhere."""
    values: list[Any] = [None] * len(graph.nodes)
    for node in graph.nodes:
        if node.kind == "use":
            values[node.index] = parameters[node.op]
        elif node.kind == "input":
            values[node.index] = inputs[int(node.op)]
        elif node.kind == "constant":
            values[node.index] = constants[node.index]
    return values


def run_graph(
    graph: Graph, parameters: Mapping[str, Tensor], inputs: Sequence[Tensor], constants: Mapping[int, Tensor]
) -> list[Any]:
    """Every node's value.

    Args:
        graph: The graph.
        parameters: By first name.
        inputs: The batch's tensors in tree order.
        constants: By node index.

    Returns:
        Tensors, and integers for sizes, by node index.
    """
    values = leaves(graph, parameters, inputs, constants)
    for node in graph.nodes:
        if node.kind in ("op", "size"):
            values[node.index] = evaluate(node, values)
    return values
