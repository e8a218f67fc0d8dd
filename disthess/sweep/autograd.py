"""Tiles by autograd on the eager model: for models that cannot be captured. Slower; the same panels.

``hessian`` rows are ``vjp`` of ``grad``, taped once per batch and applied to unit vectors. ``ggn`` rows are
``J^T (d2 loss / dz2) J e_k`` with z the model's outputs, ``J`` applied by the double-vjp identity, so that no forward mode is
needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from typing_extensions import override

from disthess.errors import GraphError
from disthess.hvp import GradientTape, decay_diagonal, twice
from disthess.planning.source import SourcePlan
from disthess.problem import Problem
from disthess.store.layout import Layout
from disthess.sweep.abstract import AbstractEngine
from disthess.sweep.buffers import Block, Buffers
from disthess.types import Part, Span


@final
class GaussNewtonTape:
    """One batch's model and loss, taped for products with the generalised Gauss-Newton matrix.

    Raises:
        GraphError: The problem has an ``objective``, so that the model's outputs are not known.
    """

    def __init__(self, problem: Problem, index: int, names: Sequence[str]) -> None:
        if problem.recipe.objective is not None:
            raise GraphError(
                "the ggn part needs to know the model's outputs, and the autograd method cannot find them inside an objective. "
                "Give loss=callable(outputs, targets) instead of objective=."
            )
        by_name = {parameter.name: parameter.tensor for parameter in problem.parameters()}
        self._leaves = [by_name[name].detach().clone().requires_grad_() for name in names]
        inputs, targets = problem.batches[index]
        outputs = problem.outputs(inputs, dict(zip(names, self._leaves, strict=True)))
        flat, spec = pytree.tree_flatten(outputs)
        live = [place for place, leaf in enumerate(flat) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not live:
            raise GraphError(
                f"the ggn part cannot see tensors inside the model's output of type {type(outputs).__name__}; return a tensor, "
                "tuple or dict of tensors, or register the type with torch.utils._pytree."
            )
        self._outputs = [flat[place] for place in live]
        self._points = [output.detach().requires_grad_() for output in self._outputs]
        for place, point in zip(live, self._points, strict=True):
            flat[place] = point
        loss = problem.weights[index] * problem.recipe.loss_of(pytree.tree_unflatten(flat, spec), targets)
        self._dual = [torch.zeros_like(output, requires_grad=True) for output in self._outputs]
        with twice():
            self._slopes = torch.autograd.grad(loss, self._points, create_graph=True, materialize_grads=True)
            self._pulled = torch.autograd.grad(
                self._outputs, self._leaves, self._dual, create_graph=True, materialize_grads=True
            )

    def products(self, vectors: Tensor) -> Tensor:
        """``G v_k``: ``[K, P]`` from ``[K, P]``."""
        pieces = torch.split(vectors, [leaf.numel() for leaf in self._leaves], dim=1)
        rows = []
        for k in range(len(vectors)):
            seeds = [piece[k].reshape(leaf.shape) for piece, leaf in zip(pieces, self._leaves, strict=True)]
            pushed = _pull(self._pulled, self._dual, seeds)
            bent = _pull(self._slopes, self._points, pushed)
            row = torch.autograd.grad(self._outputs, self._leaves, bent, retain_graph=True, materialize_grads=True)
            rows.append(torch.cat([entry.reshape(-1) for entry in row]))
        return torch.stack(rows)


def _pull(values: Sequence[Tensor], arguments: Sequence[Tensor], seeds: Sequence[Tensor]) -> list[Tensor]:
    live = [(value, seed) for value, seed in zip(values, seeds, strict=True) if value.requires_grad]
    if not live:
        return [torch.zeros_like(argument) for argument in arguments]
    with twice():
        found = torch.autograd.grad(
            [value for value, _ in live],
            arguments,
            [seed for _, seed in live],
            retain_graph=True,
            materialize_grads=True,
        )
    return list(found)


def gauss_newton_products(problem: Problem, names: Sequence[str], vectors: Tensor) -> Tensor:
    """``G v_k`` over all batches: ``[K, P]`` from ``[K, P]``, taped anew for each batch."""
    total = vectors * decay_diagonal(problem, names)
    for index in range(len(problem.batches)):
        total = total + GaussNewtonTape(problem, index, names).products(vectors)
    return total


@final
class AutogradEngine(AbstractEngine):
    """Computes tiles by products with unit vectors.

    Args:
        problem: In the dtype and on the device wanted.
        layout: The store's layout; every source is a parameter.
        sources: How each source is swept.
    """

    def __init__(self, problem: Problem, layout: Layout, sources: Mapping[str, SourcePlan]) -> None:
        self._layout = layout
        self._sources = sources
        self._names = [parameter.name for parameter in layout.parameters]
        self._sizes = [parameter.numel for parameter in layout.parameters]
        self._like = problem.parameters()[0].tensor
        batches = range(len(problem.batches))
        need_hessian = any(part != "ggn" for part in layout.parts)
        need_ggn = any(part != "hessian" for part in layout.parts)
        self._tapes: list[Any] = [
            GradientTape(problem, index, self._names) if need_hessian else None for index in batches
        ]
        self._gauss: list[Any] = [
            GaussNewtonTape(problem, index, self._names) if need_ggn else None for index in batches
        ]

    @override
    def compute(self, source: str, span: Span, split: int = 0) -> dict[Part, list[np.ndarray]]:
        plan = self._sources[source].halved(split)
        panels = self._layout.panels_of(source)
        first = sum(self._sizes[: self._names.index(source)])
        buffers = {part: Buffers(span.size, self._like.detach()) for part in self._layout.parts}
        for start in range(span.start, span.stop, plan.stack):
            block = Span(start, min(start + plan.stack, span.stop))
            seeds = self._like.new_zeros(block.size, sum(self._sizes)).detach()
            seeds[torch.arange(block.size), torch.arange(first + block.start, first + block.stop)] = 1
            for part, rows in self._rows(seeds).items():
                pieces = torch.split(rows, self._sizes, dim=1)
                for name, piece in zip(self._names, pieces, strict=True):
                    rows_of = buffers[part].take(Block(name, piece.shape[1]))
                    rows_of[block.start - span.start : block.stop - span.start] = piece
        members = {parameter.name: (parameter.name,) for parameter in self._layout.parameters}
        return {
            part: [buffers[part].assemble(panel, span, 0, members, self._layout.decay(panel, part)) for panel in panels]
            for part in self._layout.parts
        }

    def _rows(self, seeds: Tensor) -> dict[Part, Tensor]:
        hessian = sum(tape.products(seeds) for tape in self._tapes if tape is not None)
        ggn = sum(tape.products(seeds) for tape in self._gauss if tape is not None)
        found: dict[Part, Any] = {"hessian": hessian, "ggn": ggn}
        found["residual"] = hessian - ggn if "residual" in self._layout.parts else None
        return {part: found[part].detach() for part in self._layout.parts}
