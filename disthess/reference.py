"""The dense oracle: the whole Hessian by autograd on the eager model, in float64, slow and in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from disthess import hvp
from disthess.errors import ConfigError
from disthess.preflight import check_parameters
from disthess.prepare import select_parameters
from disthess.problem import Problem
from disthess.sweep.autograd import gauss_newton_products
from disthess.types import PARTS, Part


def reference_hessian(
    problem: Problem, part: Part = "hessian", parameters: str | Sequence[str] | None = None
) -> np.ndarray:
    """The dense Hessian, column by column by reverse-over-reverse mode, in float64 whatever the model's dtype.

    It shares nothing with the sweep, costs ``P`` Hessian-vector products and ``8 P**2`` bytes, and is what stores are
    compared with in tests.

    Args:
        problem: The problem.
        part: ``hessian``, ``ggn`` or ``residual``.
        parameters: Globs; default all trainable ones.

    Returns:
        ``[P, P]`` in ``named_parameters()`` order, in the objective's own scale.

    Raises:
        ConfigError: The part is unknown.
        GraphError: ``ggn`` of a problem with an ``objective`` (the model's outputs are not known).

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> problem = Problem(model, loss="mse", batches=[(torch.full((4, 1), 3.0), torch.zeros(4, 1))])
        >>> float(reference_hessian(problem)[0, 0])  # 2 x^2
        18.0
    """
    if part not in PARTS:
        raise ConfigError(f"part must be one of {', '.join(PARTS)}, got {part!r}.")
    check_parameters(problem)
    bound = problem.to(torch.float64)
    names = select_parameters(bound, parameters)
    sizes = [p.tensor.numel() for p in bound.parameters() if p.name in names]
    units = torch.eye(sum(sizes), dtype=torch.float64)
    found = {}
    if part != "ggn":
        found["hessian"] = hvp.hessian_vector_products(bound, names, units).numpy()
    if part != "hessian":
        found["ggn"] = gauss_newton_products(bound, names, units).numpy()
    return found["hessian"] - found["ggn"] if part == "residual" else found[part]
