"""Gradients and Hessian-vector products of a problem by autograd on the eager model.

This is the independent path: it shares no code with the graph sweep, and every stored Hessian is checked against it.
``L(theta) = sum_b weight_b objective(batch_b) + weight decay``; vectors are flat, in the order of ``problem.parameters()``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor

from disthess.errors import ProblemError, SecondDerivativeError
from disthess.problem import Problem


@contextmanager
def twice() -> Iterator[None]:
    """Say in a sentence that torch cannot differentiate the objective (twice)."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as reason:
        text = " ".join(str(reason).split())
        raise SecondDerivativeError(
            f"torch cannot differentiate the eager objective twice ({text[:200]}). Replace that operation by elementary ones."
        ) from reason


@final
class GradientTape:
    """The gradient of one batch's weighted objective, taped once, to be applied to many vectors.

    Args:
        problem: Already in the dtype and on the device wanted.
        index: Which batch.
        names: Parameters to differentiate by, first names.
        leaves: The parameters at the point, in the order of ``names``, each a leaf that requires its gradient: several tapes may
            share them. Copies of the problem's own by default, which may then move on.
    """

    def __init__(
        self, problem: Problem, index: int, names: Sequence[str], leaves: Sequence[Tensor] | None = None
    ) -> None:
        if leaves is None:
            by_name = {parameter.name: parameter.tensor for parameter in problem.parameters()}
            leaves = [by_name[name].detach().clone().requires_grad_() for name in names]
        self._leaves = list(leaves)
        value = problem.value(problem.batches[index], dict(zip(names, self._leaves, strict=True)))
        self.loss = problem.weights[index] * value
        if not self.loss.requires_grad:
            raise ProblemError(
                "the objective does not depend on any of the parameters asked for "
                f"({', '.join(names[:5])}{', ...' if len(names) > 5 else ''}); check requires_grad, detach() and no_grad() in it."
            )
        with twice():
            self._gradients = torch.autograd.grad(self.loss, self._leaves, create_graph=True, materialize_grads=True)

    def gradient(self) -> Tensor:
        """``weight * d objective / d theta``, flat ``[P]``."""
        return torch.cat([gradient.detach().reshape(-1) for gradient in self._gradients])

    def product(self, vector: Tensor, out: Tensor | None = None) -> Tensor:
        """``H v`` of this batch: ``[P]`` from ``[P]``, into ``out`` if it is given."""
        parts = zip(self._gradients, self._split(vector), strict=True)
        live = [(gradient, part.reshape(gradient.shape)) for gradient, part in parts if gradient.requires_grad]
        if not live:
            return torch.zeros_like(vector) if out is None else out.zero_()
        with twice():
            result = torch.autograd.grad(
                [gradient for gradient, _ in live],
                self._leaves,
                [part for _, part in live],
                retain_graph=True,
                materialize_grads=True,
            )
        return torch.cat([entry.reshape(-1) for entry in result], out=out)

    def products(self, vectors: Tensor) -> Tensor:
        """``H v_k`` for K vectors at once: ``[K, P]`` from ``[K, P]``; by a loop where an operation cannot be batched."""
        live = [index for index, gradient in enumerate(self._gradients) if gradient.requires_grad]
        if not live:
            return torch.zeros_like(vectors)
        pieces = torch.split(vectors, [leaf.numel() for leaf in self._leaves], dim=1)
        seeds = [pieces[index].reshape(-1, *self._leaves[index].shape) for index in live]
        try:
            result = torch.autograd.grad(
                [self._gradients[index] for index in live],
                self._leaves,
                seeds,
                retain_graph=True,
                is_grads_batched=True,
                materialize_grads=False,
                allow_unused=True,
            )
        except RuntimeError:
            return torch.stack([self.product(vector) for vector in vectors])
        rows = len(vectors)
        return torch.cat(
            [
                vectors.new_zeros(rows, leaf.numel()) if entry is None else entry.reshape(rows, -1)
                for entry, leaf in zip(result, self._leaves, strict=True)
            ],
            dim=1,
        )

    def _split(self, vector: Tensor) -> tuple[Tensor, ...]:
        return torch.split(vector, [leaf.numel() for leaf in self._leaves])


def gradient(problem: Problem, names: Sequence[str]) -> tuple[float, Tensor]:
    """``L`` and ``dL/dtheta`` (flat, ``[P]``, in the order of ``names``)."""
    point = torch.cat([p.tensor.detach().reshape(-1) for p in problem.parameters() if p.name in set(names)])
    decay = decay_diagonal(problem, names)
    loss, total = 0.0, decay * point
    for index in range(len(problem.batches)):
        tape = GradientTape(problem, index, names)
        loss += float(tape.loss.detach())
        total = total + tape.gradient()
    for parameter in problem.parameters():
        loss += 0.5 * problem.weight_decay.get(parameter.name, 0.0) * float(parameter.tensor.detach().square().sum())
    return loss, total


def decay_diagonal(problem: Problem, names: Sequence[str]) -> Tensor:
    """What weight decay adds to the diagonal, ``[P]`` in the order of ``names``."""
    by_name = {parameter.name: parameter.tensor for parameter in problem.parameters()}
    pieces = [by_name[name].new_full((by_name[name].numel(),), problem.weight_decay.get(name, 0.0)) for name in names]
    return torch.cat(pieces).detach()


def hessian_vector_products(problem: Problem, names: Sequence[str], vectors: Tensor) -> Tensor:
    """``H v_k`` over all batches: ``[K, P]`` from ``[K, P]``, by reverse over reverse mode, one vector at a time."""
    total = vectors * decay_diagonal(problem, names)
    for index in range(len(problem.batches)):
        tape = GradientTape(problem, index, names)
        total = total + torch.stack([tape.product(vector) for vector in vectors])
    return total


def gradient_difference_products(problem: Problem, names: Sequence[str], vectors: Tensor, step: float) -> Tensor:
    """``(g(theta + h v) - g(theta - h v)) / (2 h)`` with ``h = step / |v|``: where autograd's second derivative is in doubt."""
    by_name = {parameter.name: parameter.tensor for parameter in problem.parameters()}
    rows = []
    for vector in vectors:
        length = step / float(vector.norm().clamp_min(1e-300))
        shifted = []
        for sign in (1.0, -1.0):
            backup = [by_name[name].detach().clone() for name in names]
            offset = 0
            for name in names:
                tensor = by_name[name]
                piece = vector[offset : offset + tensor.numel()].reshape(tensor.shape)
                tensor.data.add_(piece, alpha=sign * length)
                offset += tensor.numel()
            shifted.append(gradient(problem, names)[1])
            for name, saved in zip(names, backup, strict=True):
                by_name[name].data.copy_(saved)
        rows.append((shifted[0] - shifted[1]) / (2 * length))
    return torch.stack(rows)
