"""What users call: plan, compute, open_store, reference_hessian, and the reductions."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from disthess import hvp
from disthess.certificate import certify_run
from disthess.errors import ConfigError, ExecutionError, Interrupted, PlanError, SecondDerivativeError, StoreError
from disthess.execute.executor import AbstractExecutor, SerialExecutor
from disthess.execute.marks import LedgerMarks
from disthess.execute.memory import available_memory_bytes
from disthess.execute.progress import make_progress
from disthess.execute.signals import stop_on_signals
from disthess.execute.task import AbstractJob
from disthess.execute.thread_executor import ThreadExecutor
from disthess.execute.tile_job import AutogradJob, GraphJob
from disthess.fingerprint import fingerprint
from disthess.formalism.clarke import ELEMENTS, ClarkeHessian, Element, combine
from disthess.formalism.report import TOLERANCE, kinks_of_problem
from disthess.graph.program import build_programs
from disthess.planning.plan import Plan
from disthess.preflight import check_parameters
from disthess.prepare import Options, Prepared, prepare, select_parameters
from disthess.problem import Problem
from disthess.reduce.definite import psd_check
from disthess.reduce.hessian_store import HessianStore
from disthess.reduce.results import eigenvalues, low_rank, low_rank_blocks, solve, spectral_density, trace
from disthess.reduce.shared import reduce_shared
from disthess.reference import reference_hessian
from disthess.store.disk import check_disk
from disthess.store.fingerprint import differences
from disthess.store.lock import StoreLock
from disthess.store.store import Store
from disthess.sweep.curvature import NodeCurvature, split_curvature
from disthess.sweep.primal import compute_primals
from disthess.sweep.speed import product_flops_per_second
from disthess.types import DType, Part
from disthess.units import human_bytes

__all__ = [
    "clarke_hessian",
    "compute",
    "eigenvalues",
    "low_rank",
    "low_rank_blocks",
    "node_curvature",
    "open_store",
    "plan",
    "psd_check",
    "reference_hessian",
    "solve",
    "spectral_density",
    "trace",
]


def plan(problem: Problem, *, path: str | os.PathLike[str] | None = None, **options: Any) -> Plan:
    """What `compute` would do, as a value; nothing of the Hessian is computed and nothing is written.

    Args:
        problem: The problem.
        path: Where the store would go; if given, free disk space is checked.
        **options: As for `compute`.

    Returns:
        The plan; ``print(plan.describe())`` shows it.

    Raises:
        DisthessError: As `compute`, before it starts.
    """
    prepared = prepare(problem, options_of(options))
    check_fits(prepared.plan, options_of(options), path)
    return prepared.plan


def compute(
    problem: Problem,
    path: str | os.PathLike[str],
    *,
    seed: int = 0,
    progress: bool | None = None,
    certify: bool = True,
    **options: Any,
) -> HessianStore:
    """Compute the Hessian ``H = d2 L / d theta2`` of a problem, block by block, into a store; or resume it.

    ``L`` is exactly the problem's objective, with its own ``1/N`` if it is a mean. Running again on the same path computes
    only what is missing; a store of another problem is refused.

    Args:
        problem: The problem.
        path: Directory of the store, for example ``run.zarr``.
        seed: Of the certificate's random vectors.
        progress: True or False to show progress or not; None shows it on a terminal.
        certify: Whether to end with the certificate ``|H x - hvp(x)|``.
        **options: ``parts`` (any of ``hessian``, ``ggn``, ``residual``; default hessian), ``parameters`` (globs; default
            all), ``dtype`` (default the model's), ``method`` (``auto``, ``graph``, ``autograd``), ``shared`` (``auto``,
            ``uses``, ``sum``), ``basis`` (``output``, ``parameter``: forced), ``executor`` (``serial``, ``threads``, ``ray``),
            ``workers``, ``threads`` (per worker), ``device``, ``memory_bytes`` (per worker, refuse above), ``address`` (of a
            Ray cluster), ``activations`` (names or globs of modules or nodes whose activation blocks H^f are stored too),
            ``activations_per_sample`` (keep them sample by sample), ``sections`` (names for ranges of parameters, such as
            ``{"q": "in_proj_weight[0:64]"}``, that are blocks of their own when read).

    Returns:
        The store, complete and certified.

    Raises:
        ConfigError: An option is wrong.
        ProblemError: The problem has no Hessian as given.
        GraphError: The objective cannot be captured and ``method="graph"``.
        PlanError: It would not fit.
        StoreError: The path holds something else.
        ExecutionError: Tiles failed for good.
        Interrupted: A signal stopped the run; running again resumes.
        CertificateError: The result disagrees with Hessian-vector products of the eager model.
    """
    chosen = options_of(options)
    prepared = prepare(problem, chosen)
    return run_prepared(prepared, chosen, path, seed=seed, progress=progress, certify=certify)


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


def run_prepared(
    prepared: Prepared,
    options: Options,
    path: str | os.PathLike[str],
    *,
    seed: int = 0,
    progress: bool | None = None,
    certify: bool = True,
) -> HessianStore:
    """`compute` for a problem that has been prepared (so that its plan can be shown first)."""
    place = str(Path(path))
    identity = fingerprint(prepared.problem, prepared.names, prepared.plan)
    if not Path(place).exists():
        check_fits(prepared.plan, options, place)
    with StoreLock(place):
        store = _open_or_create(place, prepared.plan, identity, options.sections)
        compute_tiles(store, prepared, options, progress, store.missing_tiles())
        return finish(store, prepared, seed=seed, certify=certify)


def finish(store: Store, prepared: Prepared, *, seed: int, certify: bool = True) -> HessianStore:
    """What follows the tiles, where it has not been done: sums over uses, loss, gradient, kinks, certificates."""
    if not store.is_reduced():
        reduce_shared(store)
        loss, gradient = hvp.gradient(prepared.problem, prepared.names)
        store.write_loss(loss)
        store.write_gradient(gradient.double().numpy())
        store.set_attributes(kinks=_kinks(prepared))
        store.mark_reduced()
    result = HessianStore(store)
    if certify:
        certify_run(result, prepared, seed)
    return result


def products_speed(plan: Plan) -> float:
    """Floating point operations per second of matrix products as one of the plan's workers would run them here."""
    return product_flops_per_second(plan.layout.dtype, plan.threads)


def open_store(path: str | os.PathLike[str]) -> HessianStore:
    """Open a store for reading.

    Raises:
        StoreError: The path is no store, or one of a newer schema.
    """
    return HessianStore(Store.open(str(Path(path))))


def check_fits(plan: Plan, options: Options, path: str | os.PathLike[str] | None) -> None:
    """Refuse a plan that does not fit on the disk or in memory, with the sizes.

    Raises:
        StoreError: Too little disk at ``path``.
        PlanError: A worker would need more memory than there is, or than ``memory_bytes``.
    """
    if path is not None:
        check_disk(str(Path(path)), plan.disk_bytes)
    if options.memory_bytes is not None and plan.peak_bytes > options.memory_bytes:
        raise PlanError(
            f"one worker would need up to {human_bytes(plan.peak_bytes)}, and memory_bytes allows "
            f"{human_bytes(options.memory_bytes)}. "
            "Allow more, give smaller batches, or select fewer parameters."
        )
    available = available_memory_bytes()
    local = options.address is None and (options.device or "cpu") == "cpu"
    if local and plan.peak_bytes * plan.workers > available:
        raise PlanError(
            f"{plan.workers} worker{'s' if plan.workers > 1 else ''} would need up to "
            f"{human_bytes(plan.peak_bytes * plan.workers)} of memory and {human_bytes(available)} are available. Use fewer "
            "workers, smaller batches, or fewer parameters."
        )


def _kinks(prepared: Prepared) -> list[dict[str, Any]] | None:
    """What is tied at the parameters, over all batches; None where the model was not captured and nobody looked."""
    if not prepared.programs:
        return None
    found = kinks_of_problem(prepared.problem, prepared.programs, prepared.names)
    return [dataclasses.asdict(report) for report in found]


def options_of(given: dict[str, Any]) -> Options:
    """Keyword arguments of `compute` as a value; an unknown one is refused."""
    known = {field.name for field in dataclasses.fields(Options)}
    unknown = sorted(set(given) - known)
    if unknown:
        raise ConfigError(f"unknown option {', '.join(unknown)}; known options are {', '.join(sorted(known))}.")
    return Options(**given)


def root_attributes(plan: Plan, identity: dict[str, Any], sections: Mapping[str, str]) -> dict[str, Any]:
    """What a new store says of itself, beside its layout."""
    return {
        "fingerprint": identity,
        "title": plan.title,
        "method": plan.method,
        "method_reason": plan.method_reason,
        "independence": plan.independence,
        "sharing": plan.sharing,
        "samples": plan.samples,
        "batches": plan.batches,
        "sections": dict(sections),
        "projected_flops": plan.flops,
        "projected_product_flops": plan.product_flops,
        "projected_peak_bytes": plan.peak_bytes,
        "projected_disk_bytes": plan.disk_bytes,
    }


def _open_or_create(path: str, plan: Plan, identity: dict[str, Any], sections: Mapping[str, str]) -> Store:
    if not Path(path).exists():
        return Store.create(path, plan.layout, root_attributes(plan, identity, sections))
    store = Store.open(path, writable=True)
    differing = differences(store.attributes.get("fingerprint", {}), identity)
    if not differing and sections and store.attributes.get("sections") != dict(sections):
        store.set_attributes(sections=dict(sections))
    if differing:
        raise StoreError(
            f"{path} holds the Hessian of another problem: {'; '.join(differing[:5])}"
            f"{f'; and {len(differing) - 5} more' if len(differing) > 5 else ''}. Choose another path, or delete that store."
        )
    return store


def _executor(plan: Plan, options: Options) -> AbstractExecutor:
    if options.executor == "serial":
        return SerialExecutor(plan.threads, plan.device)
    if options.executor == "threads":
        return ThreadExecutor(plan.workers, plan.threads, plan.device)
    # Only a run on Ray loads ray.
    from disthess.execute.ray_executor import RayExecutor

    return RayExecutor(plan.workers, plan.threads, plan.device, options.address)


def _job(store: Store, prepared: Prepared) -> AbstractJob:
    plan = prepared.plan
    path = str(Path(store.path).resolve())
    if prepared.programs:
        return GraphJob(prepared.problem, prepared.programs, plan.layout, plan.sources, path)
    return AutogradJob(prepared.problem, plan.layout, plan.sources, path)


def compute_tiles(
    store: Store, prepared: Prepared, options: Options, progress: bool | None, wanted: Sequence[int]
) -> None:
    """Compute the tiles with these numbers, and mark them done.

    Raises:
        ExecutionError: Tiles failed for good.
        Interrupted: A signal stopped it.
    """
    numbers, plan = set(wanted), prepared.plan
    tiles = [tile for tile in plan.layout.tiles if tile.index in numbers]
    if not tiles:
        return
    with stop_on_signals() as stop:
        marks = LedgerMarks(store, make_progress(progress))
        outcome = _executor(plan, options).run(_job(store, prepared), tiles, marks, stop)
    if outcome.failures:
        shown = "; ".join(f"tile {tile}: {message}" for tile, message in outcome.failures[:3])
        raise ExecutionError(
            f"{len(outcome.failures)} of {len(tiles)} tiles failed for good ({shown}). What is done is kept; running again retries "
            "the rest."
        )
    if outcome.stopped:
        left = len(store.missing_tiles())
        raise Interrupted(
            f"stopped by a signal with {left} of {len(plan.layout.tiles)} tiles left. The tiles in flight were finished; run the "
            "same again to resume."
        )
