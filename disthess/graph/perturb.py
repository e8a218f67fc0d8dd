"""Derivatives by perturbations of nodes, by autograd on the captured operations: the path activation blocks are checked by.

``L(eps)`` has ``f_v = g_v(...) + eps_v`` at every asked node, with one ``eps_v`` for all samples; its gradient and the products
with its Hessian at 0 use torch's derivatives of the operations and none of disthess's rules.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from disthess.graph.batch import rows_from_sample
from disthess.graph.ir import Node
from disthess.graph.program import Program
from disthess.graph.run import evaluate, leaves
from disthess.problem import Problem, batch_tensors


def perturbation_gradient(problem: Problem, programs: Sequence[Program], eps: Tensor) -> Tensor:
    """``dL/d eps``, flat over the asked nodes in topological order; differentiable if ``eps`` requires a gradient.

    Args:
        problem: In the dtype wanted.
        programs: One per batch.
        eps: ``[sum of d_v]``.
    """
    point = eps if eps.requires_grad else eps.detach().requires_grad_()
    with torch.enable_grad():
        loss = sum(_loss(problem, program, index, point) for index, program in enumerate(programs))
        (found,) = torch.autograd.grad(loss, point, create_graph=eps.requires_grad)  # type: ignore[arg-type]
    return found


def perturbation_products(problem: Problem, programs: Sequence[Program], vectors: Tensor) -> Tensor:
    """``(d2 L / d eps^2) x_k`` at 0, reverse over reverse mode: ``[K, D]`` from ``[K, D]``."""
    eps = torch.zeros_like(vectors[0]).requires_grad_()
    slope = perturbation_gradient(problem, programs, eps)
    if not slope.requires_grad:
        return torch.zeros_like(vectors)
    rows = [torch.autograd.grad(slope, eps, vector, retain_graph=True, materialize_grads=True)[0] for vector in vectors]
    return torch.stack(rows)


def perturbation_differences(problem: Problem, programs: Sequence[Program], vectors: Tensor, step: float) -> Tensor:
    """The same by central differences of the gradient, with steps of that length."""
    rows = []
    for vector in vectors:
        length = step / float(vector.norm().clamp_min(1e-300))
        up, down = (perturbation_gradient(problem, programs, sign * length * vector) for sign in (1.0, -1.0))
        rows.append((up - down) / (2 * length))
    return torch.stack(rows)


def _loss(problem: Problem, program: Program, index: int, eps: Tensor) -> Tensor:
    graph = program.graph
    parameters = {parameter.name: parameter.tensor.detach() for parameter in problem.parameters()}
    values = leaves(graph, parameters, batch_tensors(problem.batches[index]), program.constants)
    start = 0
    for node in graph.nodes:
        if node.kind in ("op", "size"):
            values[node.index] = evaluate(node, values)
        if node.asked:
            size = _entries(node, graph.samples)
            values[node.index] = values[node.index] + _spread(node, values[node.index], eps[start : start + size])
            start += size
    return problem.weights[index] * values[graph.loss]


def _entries(node: Node, samples: int) -> int:
    count = 1
    for size in node.shape:
        count *= size
    return count if node.batch is None else count // samples


def _spread(node: Node, value: Tensor, entries: Tensor) -> Tensor:
    """One sample's perturbation at every sample."""
    samples = 1 if node.batch is None else value.numel() // entries.numel()
    return rows_from_sample(entries.expand(1, samples, -1), tuple(value.shape), node.batch, samples)[0]
