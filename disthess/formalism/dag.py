"""A network as the paper sees it: nodes ``f_k = g_k(f_Pa(k), theta_k)`` in topological order, and a loss of the last one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from disthess.errors import ConfigError

_PREFIX = "theta:"


def theta(parameter: str) -> str:
    """The key of a parameter tensor among the arguments of nodes.

    >>> theta("fc1.weight")
    'theta:fc1.weight'
    """
    return _PREFIX + parameter


@dataclass(frozen=True, slots=True)
class DagNode:
    """One node.

    Attributes:
        name: Unique.
        parents: Names of the nodes it reads, each once.
        parameters: Names of the parameter tensors it reads, each once; several nodes may read the same one.
        function: ``function(*values of parents, *values of parameters)``, a tensor of any shape.
        in_model: False for nodes of the loss, whose curvature belongs to the generalised Gauss-Newton part.
    """

    name: str
    parents: tuple[str, ...]
    parameters: tuple[str, ...]
    function: Callable[..., Tensor]
    in_model: bool = True

    @property
    def arguments(self) -> tuple[str, ...]:
        """``A_k``: parents, then the keys of parameters."""
        return (*self.parents, *(theta(name) for name in self.parameters))


@final
@dataclass(frozen=True, slots=True)
class Dag:
    """A network and its loss.

    Attributes:
        nodes: In topological order; the last is ``out``.
        parameters: Values by name, in the order of rows and columns of the Hessian.
        loss: The scalar ``L(f_out)``; None if the last node is L itself.

    Raises:
        ConfigError: A node reads what is not there or comes later, a name stands twice, or L is no scalar.
    """

    nodes: tuple[DagNode, ...]
    parameters: Mapping[str, Tensor]
    loss: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for node in self.nodes:
            if node.name in seen or node.name.startswith(_PREFIX):
                raise ConfigError(f"the node name {node.name!r} is taken; give every node a name of its own.")
            lost = [name for name in node.parents if name not in seen]
            lost += [name for name in node.parameters if name not in self.parameters]
            if lost:
                raise ConfigError(f"node {node.name!r} reads {', '.join(lost)}, which no earlier node or parameter is.")
            if len(set(node.arguments)) != len(node.arguments):
                raise ConfigError(
                    f"node {node.name!r} names an argument twice; name it once and use it twice in its function."
                )
            seen.add(node.name)
        if not self.nodes:
            raise ConfigError("a network needs at least one node.")

    @property
    def out(self) -> DagNode:
        """The last node."""
        return self.nodes[-1]

    @property
    def sizes(self) -> dict[str, int]:
        """``p`` of each parameter tensor."""
        return {name: tensor.numel() for name, tensor in self.parameters.items()}

    def run(self, parameters: Mapping[str, Tensor], shifts: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Every node's value, with ``shifts[v]`` added to the output of node v (the perturbation eps_v)."""
        values: dict[str, Tensor] = {}
        for node in self.nodes:
            value = node.function(
                *(values[name] for name in node.parents), *(parameters[name] for name in node.parameters)
            )
            if shifts is not None and node.name in shifts:
                value = value + shifts[node.name].reshape(value.shape)
            values[node.name] = value
        return values

    def objective(self, values: Mapping[str, Tensor]) -> Tensor:
        """L from the values of nodes."""
        last = values[self.out.name]
        found = last if self.loss is None else self.loss(last)
        if found.numel() != 1:
            raise ConfigError(
                f"the loss must be a scalar, it has shape {list(found.shape)}; reduce it with .mean() or .sum()."
            )
        return found.reshape(())

    def reordered(self, order: tuple[str, ...]) -> Dag:
        """The same network with its nodes in another topological order.

        Raises:
            ConfigError: The order is not topological, or names other nodes.
        """
        by_name = {node.name: node for node in self.nodes}
        if sorted(order) != sorted(by_name) or order[-1] != self.out.name:
            raise ConfigError(f"an order names every node once, {self.out.name!r} last; got {', '.join(order)}.")
        return Dag(tuple(by_name[name] for name in order), self.parameters, self.loss)


Blocks = dict[tuple[str, str], Tensor]
"""Matrices by pair of names; a pair that is absent is zero."""


def add_block(blocks: Blocks, a: str, b: str, value: Tensor) -> None:
    """``blocks[a, b] += value``."""
    blocks[a, b] = blocks[a, b] + value if (a, b) in blocks else value


def dense(blocks: Mapping[tuple[str, str], Any], sizes: Mapping[str, int]) -> Tensor:
    """The whole matrix from blocks, in the order of ``sizes``, float64."""
    rows = []
    for a in sizes:
        pieces = [blocks.get((a, b), torch.zeros(sizes[a], sizes[b], dtype=torch.float64)) for b in sizes]
        rows.append(torch.cat(pieces, dim=1))
    return torch.cat(rows)
