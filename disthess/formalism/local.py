"""Derivatives of each node alone, and what follows from them at first order. Everything flattened row-major.

D_{u<-a} = d g_u / d a                              [d_u, d_a]    a a parent or a parameter of u
delta_u  = dL / df_u                                [d_u]
S_u[a,b] = sum_i delta_{u,i} d2 g_{u,i} / da db     [d_a, d_b]    the Hessian of delta_u^T g_u, delta_u held fixed
J_{x<-v} = total derivative of f_x by f_v           [d_x, d_v]    J_{v<-v} = I, J_{x<-v} = sum_{a in Pa(x)} D_{x<-a} J_{a<-v}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import functional

from disthess.formalism.dag import Blocks, Dag, DagNode, theta


@dataclass(frozen=True, slots=True)
class Local:
    """The point a network stands at.

    Attributes:
        dag: The network, in this order.
        nodes: Live nodes by name, in order: those that reach ``out``.
        children: ``Ch(v)`` among live nodes.
        delta: By node.
        jacobians: ``D[u, a]``.
        curvatures: ``S[u][a, b]``.
        totals: ``J[x, v]``; absent where v does not lead to x.
        outer: ``nabla^2 L`` by ``f_out``, zero where the last node is L itself.
    """

    dag: Dag
    nodes: dict[str, DagNode]
    children: Mapping[str, tuple[str, ...]]
    delta: Mapping[str, Tensor]
    jacobians: Blocks
    curvatures: Mapping[str, Blocks]
    totals: Blocks
    outer: Tensor

    @property
    def sizes(self) -> dict[str, int]:
        """``d_v`` of live nodes."""
        return {name: self.delta[name].numel() for name in self.nodes}


def differentiate(dag: Dag) -> Local:
    """All local derivatives by autograd, node by node, in float64.

    Args:
        dag: The network; parameters must be float64.

    Returns:
        The point. Nodes that do not reach ``out`` are left out.
    """
    values = {name: value.detach() for name, value in dag.run(dag.parameters).items()}
    nodes = _live(dag)
    children = {name: tuple(u for u, node in nodes.items() if name in node.parents) for name in nodes}
    jacobians: Blocks = {}
    for name, node in nodes.items():
        arguments = _arguments(dag, node, values)
        found = functional.jacobian(_flat(node), arguments, vectorize=False)
        for key, argument, matrix in zip(node.arguments, arguments, found, strict=True):
            jacobians[name, key] = matrix.reshape(-1, argument.numel())
    last = values[dag.out.name].reshape(-1)
    slope, outer = torch.ones(1, dtype=torch.float64), torch.zeros(last.numel(), last.numel(), dtype=torch.float64)
    if dag.loss is not None:
        shape, loss = values[dag.out.name].shape, dag.loss
        slope = functional.jacobian(lambda flat: loss(flat.reshape(shape)).reshape(()), last)
        outer = functional.hessian(lambda flat: loss(flat.reshape(shape)).reshape(()), last)
    delta = {dag.out.name: slope.reshape(-1)}
    for name in reversed([name for name in nodes if name != dag.out.name]):
        delta[name] = sum(jacobians[u, name].T @ delta[u] for u in children[name])  # type: ignore[assignment]
    curvatures = {name: _curvature(dag, node, values, delta[name]) for name, node in nodes.items()}
    return Local(dag, nodes, children, delta, jacobians, curvatures, _totals(nodes, jacobians, delta), outer)


def _live(dag: Dag) -> dict[str, DagNode]:
    reached = {dag.out.name}
    for node in reversed(dag.nodes):
        if node.name in reached:
            reached.update(node.parents)
    return {node.name: node for node in dag.nodes if node.name in reached}


def _arguments(dag: Dag, node: DagNode, values: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    return (*(values[name] for name in node.parents), *(dag.parameters[name].detach() for name in node.parameters))


def _flat(node: DagNode):  # type: ignore[no-untyped-def]
    return lambda *arguments: node.function(*arguments).reshape(-1)


def _curvature(dag: Dag, node: DagNode, values: Mapping[str, Tensor], delta: Tensor) -> Blocks:
    arguments = _arguments(dag, node, values)
    sizes = [argument.numel() for argument in arguments]

    def scalar(flat: Tensor) -> Tensor:
        pieces = [piece.reshape(a.shape) for piece, a in zip(flat.split(sizes), arguments, strict=True)]
        return (delta * node.function(*pieces).reshape(-1)).sum()

    if not arguments:
        return {}
    whole = functional.hessian(scalar, torch.cat([argument.reshape(-1) for argument in arguments]))
    rows = [row.split(sizes, dim=1) for row in whole.split(sizes)]
    return {(a, b): rows[i][j] for i, a in enumerate(node.arguments) for j, b in enumerate(node.arguments)}


def _totals(nodes: Mapping[str, DagNode], jacobians: Blocks, delta: Mapping[str, Tensor]) -> Blocks:
    totals: Blocks = {}
    for v in nodes:
        totals[v, v] = torch.eye(delta[v].numel(), dtype=torch.float64)
        for x, node in nodes.items():
            terms = [jacobians[x, a] @ totals[a, v] for a in node.parents if (a, v) in totals]
            if terms and x != v:
                totals[x, v] = sum(terms)  # type: ignore[assignment]
    return totals


def users(local: Local, parameter: str) -> Sequence[str]:
    """Live nodes that read a parameter."""
    return [name for name, node in local.nodes.items() if theta(parameter) in node.arguments]
