"""How much of the Hessian's trace is the Gauss-Newton matrix's: ``G = J^T (d2 loss / dz2) J`` for the model's outputs z.

``v^T G v = (J v)^T (d2 loss / dz2) (J v)`` needs no product with G itself. J v comes from the tape of ``u -> J^T u``, which is
linear in u, by one more backward pass; eager torch does it for any model that has second derivatives.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, final

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.utils import _pytree as pytree
from typing_extensions import override

from disthess import hvp
from disthess.errors import ProblemError
from disthess.linalg.moments import Moments, Ranged
from disthess.problem import Problem


class AbstractForms(abc.ABC):
    """``v -> v^T G v``."""

    @abc.abstractmethod
    def forms(self, vectors: np.ndarray) -> np.ndarray:
        """``v_k^T G v_k``, ``[K]`` from ``[P, K]``."""


@final
class GaussNewtonForms(AbstractForms):
    """``v -> v^T G v`` at a problem's parameters, all batches and weight decay, which is part of G as of H.

    Args:
        problem: In the dtype and on the device wanted.
        names: Parameters, first names.

    Raises:
        ProblemError: Where the model ends and the loss begins is not known, or parameters act on both sides.
    """

    def __init__(self, problem: Problem, names: Sequence[str]) -> None:
        self._decay = hvp.decay_diagonal(problem, names)
        self._batches = [_Batch(problem, index, names) for index in range(len(problem.batches))]

    @override
    def forms(self, vectors: np.ndarray) -> np.ndarray:
        found = np.empty(vectors.shape[1])
        for place, column in enumerate(vectors.T):
            vector = torch.from_numpy(np.ascontiguousarray(column)).to(self._decay)
            total = float((vector.square() * self._decay).sum())
            found[place] = total + sum(batch.form(vector) for batch in self._batches)
        return found


def ggn_share(forms: AbstractForms, moments: Moments, *, confidence: float) -> Ranged:
    """``tr G / (|tr G| + |tr(H - G)|)`` from the vectors that gave the trace of H; no further product with H.

    On Q both traces are known. The rest is a mean over vectors, the same for both; the interval is their jackknife's.
    """
    known = float(forms.forms(moments.basis).sum())
    own, whole = forms.forms(moments.vectors), moments.forms
    total = float(moments.basis_forms.sum())
    count = len(own)

    def share(kept: np.ndarray) -> float:
        return share_of(known + float(own[kept].mean()), total + float(whole[kept].mean()))

    value = share(np.arange(count))
    apart = np.array([share(np.delete(np.arange(count), place)) for place in range(count)])
    error = np.sqrt((count - 1) / count * float(((apart - apart.mean()) ** 2).sum()))
    half = float(stats.t.ppf(0.5 * (1 + confidence), count - 1)) * error
    return Ranged(value, max(-1.0, value - half), min(1.0, value + half))


def share_of(gauss_newton: float, hessian: float) -> float:
    """``G / (|G| + |H - G|)`` of two traces; NaN where both are zero.

    >>> share_of(3.0, 2.0), share_of(2.0, 2.0)
    (0.75, 1.0)
    """
    total = abs(gauss_newton) + abs(hessian - gauss_newton)
    return gauss_newton / total if total > 0 else float("nan")


@final
class _Batch:
    """One batch: outputs z taped as a function of theta, the loss as a function of z."""

    def __init__(self, problem: Problem, index: int, names: Sequence[str]) -> None:
        by_name = {parameter.name: parameter.tensor for parameter in problem.parameters()}
        self._leaves = [by_name[name].detach().clone().requires_grad_() for name in names]
        swapped = dict(zip(names, self._leaves, strict=True))
        outputs, self._cut, loss = (_by_loss if problem.recipe.objective is None else _by_output)(
            problem, index, swapped
        )
        with hvp.twice():
            slopes = torch.autograd.grad(
                problem.weights[index] * loss, [*self._cut, *self._leaves], create_graph=True, allow_unused=True
            )
            _refuse_parameters_behind(slopes[len(self._cut) :])
            self._slopes = slopes[: len(self._cut)]
            self._seeds = [torch.zeros_like(output, requires_grad=True) for output in outputs]
            self._pulled = torch.autograd.grad(outputs, self._leaves, self._seeds, create_graph=True, allow_unused=True)
        self._splits = [leaf.numel() for leaf in self._leaves]

    def form(self, vector: Tensor) -> float:
        """``(J v)^T (d2 loss / dz2) (J v)``."""
        pieces = zip(self._pulled, vector.split(self._splits), strict=True)
        live = [(pulled, piece.reshape(pulled.shape)) for pulled, piece in pieces if pulled is not None]
        bent = [(slope, place) for place, slope in enumerate(self._slopes) if slope is not None and slope.requires_grad]
        if not live or not bent:
            return 0.0
        with hvp.twice():
            moved = torch.autograd.grad(
                [pulled for pulled, _ in live], self._seeds, [piece for _, piece in live],
                retain_graph=True, materialize_grads=True,
            )  # fmt: skip
            image = torch.autograd.grad(
                [slope for slope, _ in bent], self._cut, [moved[place] for _, place in bent],
                retain_graph=True, materialize_grads=True,
            )  # fmt: skip
        return sum(float((one * other).sum()) for one, other in zip(moved, image, strict=True))


def _by_loss(problem: Problem, index: int, swapped: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Outputs, the same cut off from the parameters, and the loss of these."""
    inputs, targets = problem.batches[index]
    found = problem.outputs(inputs, swapped)
    if isinstance(problem.recipe.loss, str):
        found = getattr(found, "logits", found)
    leaves, spec = pytree.tree_flatten(found)
    moving = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not moving:
        raise ProblemError(f"the model's output is {type(found).__name__}, in which no tensor is found")
    outputs = [leaves[place] for place in moving]
    cut = [output.detach().requires_grad_() for output in outputs]
    for place, tensor in zip(moving, cut, strict=True):
        leaves[place] = tensor
    return outputs, cut, problem.recipe.loss_of(pytree.tree_unflatten(leaves, spec), targets)


def _by_output(problem: Problem, index: int, swapped: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The same where the problem names the module that the model ends with."""
    if problem.output is None:
        raise ProblemError("the objective does not say where the model ends; name it as Problem(..., output=...)")
    modules = dict(problem.model.named_modules())
    if problem.output not in modules:
        raise ProblemError(f"the model has no module {problem.output!r}")
    seen: list[tuple[Tensor, Tensor]] = []

    def cut(module: Any, inputs: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):
            raise ProblemError(
                f"the module {problem.output!r} gives {type(output).__name__}, where a tensor is expected"
            )
        seen.append((output, output.detach().requires_grad_()))
        return seen[-1][1]

    handle = modules[problem.output].register_forward_hook(cut)
    try:
        loss = problem.value(problem.batches[index], swapped)
    finally:
        handle.remove()
    if len(seen) != 1:
        raise ProblemError(f"the module {problem.output!r} is called {len(seen)} times, where once is expected")
    return [seen[0][0]], [seen[0][1]], loss


def _refuse_parameters_behind(slopes: Sequence[Tensor | None]) -> None:
    if any(slope is not None and bool(slope.detach().any()) for slope in slopes):
        raise ProblemError(
            "parameters act after the model's output, so that Gauss-Newton leaves out more than curvature"
        )
