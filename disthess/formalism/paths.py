"""Method path: the generalised Gauss-Newton matrix and one summand per nonlinear node. The simplest, slow; a good oracle.

With ``T_x = df_x / d theta`` (total) and ``A_x`` the total derivatives of all arguments of x (of a parameter: unit rows),

    H^theta = T_out^T nabla^2 L T_out + sum over nodes x of A_x^T S_x A_x

Summands of the nodes of the loss belong to the generalised Gauss-Newton part, those of the model to the residual.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from disthess.formalism.dag import theta
from disthess.formalism.local import Local


@dataclass(frozen=True, slots=True)
class PathSplit:
    """The Hessian in parts, each ``[P, P]``.

    Attributes:
        ggn: ``J^T (nabla^2 loss) J`` with J the derivative of the model's outputs.
        curvature: ``A_x^T S_x A_x`` of each node of the model where it is not zero.
    """

    ggn: Tensor
    curvature: Mapping[str, Tensor]

    @property
    def hessian(self) -> Tensor:
        """``H^theta``: the sum of all."""
        return sum(self.curvature.values(), start=self.ggn)


def split_paths(local: Local) -> PathSplit:
    """Total derivatives forward, one summand per node."""
    slopes = _selectors(local)
    for x, node in local.nodes.items():
        terms = [local.jacobians[x, a] @ slopes[a] for a in node.arguments]
        slopes[x] = sum(terms, start=torch.zeros_like(_zero(local, x)))
    last = slopes[local.dag.out.name]
    ggn, curvature = last.T @ local.outer @ last, {}
    for x, node in local.nodes.items():
        terms = [slopes[a].T @ block @ slopes[b] for (a, b), block in local.curvatures[x].items()]
        summand = sum(terms, start=torch.zeros_like(ggn))
        if not node.in_model:
            ggn = ggn + summand
        elif bool((summand != 0).any()):
            curvature[x] = summand
    return PathSplit(ggn, curvature)


def _zero(local: Local, node: str) -> Tensor:
    return torch.zeros(local.delta[node].numel(), sum(local.dag.sizes.values()), dtype=torch.float64)


def _selectors(local: Local) -> dict[str, Tensor]:
    sizes = local.dag.sizes
    unit, start, found = torch.eye(sum(sizes.values()), dtype=torch.float64), 0, {}
    for name, size in sizes.items():
        found[theta(name)] = unit[start : start + size]
        start += size
    return found
