"""What bends a problem at its point, without a store: the share of every node, and the pieces that meet at a kink."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from disthess.errors import ConfigError, PlanError, SecondDerivativeError
from disthess.execute.memory import available_memory_bytes
from disthess.formalism.clarke import ELEMENTS, ClarkeHessian, Element, combine
from disthess.formalism.report import TOLERANCE
from disthess.graph.program import build_programs
from disthess.preflight import check_given, check_parameters
from disthess.prepare import Options, prepare, select_parameters
from disthess.problem import Problem
from disthess.reference import reference_hessian
from disthess.sweep.curvature import NodeCurvature, split_curvature
from disthess.sweep.primal import compute_primals
from disthess.types import DType, Part
from disthess.units import human_bytes


def node_curvature(
    problem: Problem,
    *,
    parameters: str | Sequence[str] | None = None,
    dtype: DType | None = None,
    matrices: bool = False,
) -> NodeCurvature:
    """How much of the Hessian each node of the model contributes: ``H = ggn + sum over nodes x of A_x^T S_x A_x``.

    ``S_x`` is the node's own second derivative, weighed by the loss's gradient at its output, and ``A_x`` the total derivative
    of its arguments by the parameters. The sum over nodes is exactly the residual part. (With an ``objective`` whose ``output``
    is not named the nodes of the loss are among them, and the sum is the Hessian.) Weight decay belongs to no node.

    Args:
        problem: One that can be captured.
        parameters: Globs; default all trainable ones. Memory grows with the square of their number.
        dtype: ``float32`` or ``float64``; default the model's.
        matrices: Whether to return each node's matrix, ``[P, P]``.

    Returns:
        Norm, trace and share of each node; shares add up to 1.

    Raises:
        GraphError: The model cannot be captured.
        PlanError: It does not fit in memory.
    """
    prepared = prepare(problem, Options(parameters=parameters, dtype=dtype, method="graph"))
    tensors = {parameter.name: parameter.tensor for parameter in prepared.problem.parameters()}
    primals = compute_primals(prepared.problem, prepared.programs)
    part: Part = "residual" if prepared.programs[0].graph.has_model_boundary else "hessian"
    chosen = {name: tensors[name] for name in prepared.names}
    return split_curvature(primals, chosen, part, available_memory_bytes(), matrices)


def clarke_hessian(
    problem: Problem,
    *,
    element: Element = "min_norm",
    tol: float | None = None,
    max_patterns: int = 256,
    parameters: str | Sequence[str] | None = None,
) -> ClarkeHessian:
    """The set of Hessians at a kink: one for each smooth piece that can be reached from there, and one element of their hull.

    Where a relu, a maximum, a hinge or a comparison is tied, torch's Hessian follows a convention and may be the Hessian of no
    piece at all. This gives every piece's, in float64, densely: for small problems, or few ``parameters``. With no tie it is the
    ordinary Hessian.

    Args:
        problem: One that can be captured.
        element: ``min_norm`` (``argmin |M|_F`` over the hull), ``b`` (the Hessian of one piece, the nearest to torch's), or
            ``torch`` (autograd's own, for comparison).
        tol: How close to a kink counts as tied, relative to the largest magnitude of the operation's input; default 1e-9, and
            1e-6 for a model in float32.
        max_patterns: More realisable patterns are refused.
        parameters: Globs; default all trainable ones.

    Returns:
        The matrix, the patterns, their Hessians, gradients and weights, and what they say: see `ClarkeHessian`.

    Raises:
        ConfigError: An argument is wrong.
        GraphError: The model cannot be captured.
        ProblemError: More patterns than ``max_patterns``, or no piecewise smooth function.
        PlanError: It does not fit in memory.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> kinked = Problem(model, objective=lambda m, x: m(x).sum() + m(x).relu().square().sum(), batches=[torch.ones(1, 1)])
        >>> [float(h[0, 0]) for h in clarke_hessian(kinked).hessians]
        [0.0, 2.0]
    """
    check_given(problem)
    if element not in ELEMENTS:
        raise ConfigError(f"element must be one of {', '.join(ELEMENTS)}, got {element!r}.")
    tol = TOLERANCE[torch.float64 if problem.dtype == torch.float64 else torch.float32] if tol is None else tol
    if not 0 <= tol < 1 or max_patterns < 1:
        raise ConfigError(f"tol must be in [0, 1) and max_patterns positive, got {tol!r} and {max_patterns!r}.")
    check_parameters(problem)
    bound = problem.to(torch.float64)
    names = select_parameters(bound, parameters)
    tensors = {parameter.name: parameter.tensor for parameter in bound.parameters() if parameter.name in names}
    numel = sum(tensor.numel() for tensor in tensors.values())
    available = available_memory_bytes()
    if 32 * numel * numel > available:
        raise PlanError(
            f"the Hessians are dense, and {numel:,} parameters need at least {human_bytes(32 * numel * numel)} of which "
            f"{human_bytes(available)} are available. Select fewer parameters."
        )
    programs = build_programs(bound, frozenset(names))
    try:
        eager = reference_hessian(bound, parameters=parameters)
    except SecondDerivativeError:
        # The captured graph can often be differentiated where a fused kernel cannot.
        eager = None
    return combine(bound, programs, tensors, eager, element, tol, max_patterns, available)
