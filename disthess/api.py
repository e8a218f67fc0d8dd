"""What users call: plan, compute, open_store, reference_hessian, and the reductions."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from disthess import hvp
from disthess.certificate import certify_run
from disthess.errors import ConfigError, ExecutionError, Interrupted, PlanError, StoreError
from disthess.execute.executor import AbstractExecutor, SerialExecutor
from disthess.execute.marks import LedgerMarks
from disthess.execute.memory import available_memory_bytes
from disthess.execute.process_executor import ProcessExecutor
from disthess.execute.progress import make_progress
from disthess.execute.signals import stop_on_signals
from disthess.execute.task import AbstractJob
from disthess.execute.thread_executor import ThreadExecutor
from disthess.execute.tile_job import AutogradJob, GraphJob
from disthess.fingerprint import fingerprint
from disthess.formalism.report import kinks_of_problem
from disthess.planning.plan import Plan
from disthess.preflight import check_given
from disthess.prepare import Options, Prepared, prepare
from disthess.problem import Problem
from disthess.reduce.definite import psd_check
from disthess.reduce.hessian_store import HessianStore
from disthess.reduce.results import eigenvalues, low_rank, low_rank_blocks, solve, spectral_density, trace
from disthess.reduce.shared import reduce_shared
from disthess.reference import reference_hessian
from disthess.store.disk import check_disk
from disthess.store.fingerprint import differences
from disthess.store.lock import StoreLock
from disthess.store.place import AbstractPlace, place_of
from disthess.store.store import Store
from disthess.sweep.speed import ASSUMED_FLOPS_PER_SECOND, is_device_here, product_flops_per_second
from disthess.units import human_bytes

__all__ = [
    "compute",
    "eigenvalues",
    "low_rank",
    "low_rank_blocks",
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

    Neither the workers nor their devices need be here. Nor need values: a model built under ``torch.device("meta")``, with batches
    of meta tensors or of data, is planned by its shapes, and the plan says what could not be checked.

    Args:
        problem: The problem.
        path: Where the store would go; if given, free disk space is checked, unless the run would be elsewhere.
        **options: As for `compute`.

    Returns:
        The plan; ``print(plan.describe())`` shows it.

    Raises:
        DisthessError: As `compute`, before it starts.
    """
    chosen = options_of(options)
    made = prepare(problem, chosen, planning=True).plan
    elsewhere = bool(made.not_checked) or chosen.address is not None or not is_device_here(made.device)
    check_fits(made, chosen, None if elsewhere else path, here=not elsewhere)
    return made


def compute(
    problem: Problem,
    path: str | os.PathLike[str],
    *,
    seed: int = 0,
    progress: bool | None = None,
    certify: bool = True,
    client: Any = None,
    **options: Any,
) -> HessianStore:
    """Compute the Hessian ``H = d2 L / d theta2`` of a problem, block by block, into a store; or resume it.

    ``L`` is exactly the problem's objective, with its own ``1/N`` if it is a mean. Running again on the same path computes
    only what is missing; a store of another problem is refused.

    Args:
        problem: The problem.
        path: Directory of the store, for example ``run.zarr``, or its URL on an object store, ``s3://bucket/run.zarr``.
        seed: Of the certificate's random vectors.
        progress: True or False to show progress or not; None shows it on a terminal.
        certify: Whether to end with the certificate ``|H x - hvp(x)|``.
        client: A ``dask.distributed`` Client for the sums over uses of shared parameters; None for threads.
        **options: ``parts`` (any of ``hessian``, ``ggn``, ``residual``; default hessian), ``parameters`` (globs, or ranges
            such as ``attn.in_proj_weight[0:64]``, all else then being constant; default all), ``dtype`` (default the model's),
            ``method`` (``auto``, ``graph``, ``autograd``), ``shared`` (``auto``,
            ``uses``, ``sum``), ``basis`` (``output``, ``parameter``: forced), ``executor`` (``serial``, ``threads``,
            ``processes``, ``ray``),
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
    return run_prepared(prepared, chosen, path, seed=seed, progress=progress, certify=certify, client=client)


def run_prepared(
    prepared: Prepared,
    options: Options,
    path: str | os.PathLike[str],
    *,
    seed: int = 0,
    progress: bool | None = None,
    certify: bool = True,
    client: Any = None,
) -> HessianStore:
    """`compute` for a problem that has been prepared (so that its plan can be shown first)."""
    place = place_of(path)
    _check_place(place, options)
    identity = fingerprint(prepared.problem, prepared.names, prepared.plan)
    if not place.exists():
        check_fits(prepared.plan, options, place.name)
    with StoreLock(place) as lease:
        store = _open_or_create(place, prepared.plan, identity, options.sections)
        store.hold(lease)
        compute_tiles(store, prepared, options, progress, store.missing_tiles())
        result = finish(store, prepared, seed=seed, certify=certify, client=client)
        store.hold(None)
        return result


def finish(store: Store, prepared: Prepared, *, seed: int, certify: bool = True, client: Any = None) -> HessianStore:
    """What follows the tiles, where it has not been done: sums over uses, loss, gradient, kinks, certificates."""
    if not store.is_reduced():
        if store.is_local:
            # Chunks half written by workers that were killed; whoever is here holds the store's lock.
            store.remove_leftovers()
        reduce_shared(store, client)
        loss, gradient = hvp.gradient(prepared.problem, prepared.names)
        store.write_loss(loss)
        store.write_gradient(gradient.double().numpy())
        store.set_attributes(kinks=_kinks(prepared))
        store.mark_reduced()
    result = HessianStore(store)
    if certify:
        certify_run(result, prepared, seed)
    return result


def products_speed(plan: Plan, given: float | None = None) -> tuple[float, str]:
    """Floating point operations per second of one worker's matrix products, and in words where that rate comes from.

    Args:
        plan: The plan.
        given: A rate to take; else it is measured where the plan's device is here, and assumed where it is not.

    Raises:
        ConfigError: The device is none that torch knows.
    """
    if given is not None:
        return given, "as given"
    if is_device_here(plan.device):
        return product_flops_per_second(plan.layout.dtype, plan.threads, plan.device), "measured here"
    return ASSUMED_FLOPS_PER_SECOND, f"which is assumed: torch sees no {plan.device} here to measure, so give its rate"


def open_store(path: str | os.PathLike[str], problem: Problem | None = None, **options: Any) -> HessianStore:
    """Open a store for reading; ``path`` is a directory or the URL of one on an object store.

    Args:
        path: The store.
        problem: The problem it belongs to, so that ``store.read(rows, cols, compute=True)`` can compute what an unfinished store
            lacks.
        **options: With a problem: those that the store was computed with, as for `compute`.

    Raises:
        StoreError: The path is no store, or one of a newer schema.
        ConfigError: An option is wrong, or the problem is none.
    """
    chosen = options_of(options)
    if problem is None:
        return HessianStore(Store.open(path))
    check_given(problem)
    return HessianStore(Store.open(path), lambda sources: _fill(path, problem, chosen, sources))


def _fill(path: str | os.PathLike[str], problem: Problem, options: Options, sources: Sequence[str]) -> None:
    """Compute the missing tiles of the panels of these parameters; all of them where one is a sum over uses."""
    prepared = prepare(problem, options)
    place = place_of(path)
    _check_place(place, options)
    with StoreLock(place) as lease:
        store = _open_or_create(
            place, prepared.plan, fingerprint(prepared.problem, prepared.names, prepared.plan), options.sections
        )
        store.hold(lease)
        layout = store.layout
        panels = {(p.kind, p.index): p for p in layout.panels if p.kind == "panels" and p.source in set(sources)}
        wanted = {name for name, keys in layout.outputs if panels.keys() & set(keys)}
        summed = any(panel.reduced for panel in panels.values())
        missing = store.missing_tiles()
        tiles = [tile for tile in missing if summed or layout.tiles[tile].source in wanted]
        compute_tiles(store, prepared, options, None, tiles)
        if not store.missing_tiles():
            finish(store, prepared, seed=0)
        store.hold(None)


def has_store(path: str | os.PathLike[str]) -> bool:
    """Whether anything is where a store would be."""
    return place_of(path).exists()


def check_fits(plan: Plan, options: Options, path: str | os.PathLike[str] | None, *, here: bool = True) -> None:
    """Refuse a plan that does not fit on the disk or in memory, with the sizes; ``here``: in this machine's memory.

    Raises:
        StoreError: Too little disk at ``path``.
        PlanError: A worker would need more memory than there is, or than ``memory_bytes``.
    """
    if path is not None:
        check_disk(path, plan.disk_bytes)
    if options.memory_bytes is not None and plan.peak_bytes > options.memory_bytes:
        raise PlanError(
            f"one worker would need up to {human_bytes(plan.peak_bytes)}, and memory_bytes allows "
            f"{human_bytes(options.memory_bytes)}. "
            "Allow more, give smaller batches, or select fewer parameters."
        )
    available = available_memory_bytes()
    local = here and options.address is None and (options.device or "cpu") == "cpu"
    if local and plan.peak_bytes * plan.workers > available:
        raise PlanError(
            f"{plan.workers} worker{'s' if plan.workers > 1 else ''} would need up to "
            f"{human_bytes(plan.peak_bytes * plan.workers)} of memory and {human_bytes(available)} are available. Use fewer "
            "workers, smaller batches, or fewer parameters."
        )


def _check_place(place: AbstractPlace, options: Options) -> None:
    if options.executor == "processes" and not place.is_local:
        raise ConfigError(
            f"executor='processes' writes to a directory, got {place.name}: connections to an object store do not survive a fork. "
            "Use executor='threads' or 'ray'."
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


def _open_or_create(place: AbstractPlace, plan: Plan, identity: dict[str, Any], sections: Mapping[str, str]) -> Store:
    if not place.exists():
        return Store.create(place, plan.layout, root_attributes(plan, identity, sections))
    store = Store.open(place, writable=True)
    differing = differences(store.attributes.get("fingerprint", {}), identity)
    if not differing and sections and store.attributes.get("sections") != dict(sections):
        store.set_attributes(sections=dict(sections))
    if differing:
        raise StoreError(
            f"{place.name} holds the Hessian of another problem: {'; '.join(differing[:5])}"
            f"{f'; and {len(differing) - 5} more' if len(differing) > 5 else ''}. Choose another path, or delete that store."
        )
    return store


def _executor(plan: Plan, options: Options) -> AbstractExecutor:
    if options.executor == "serial":
        return SerialExecutor(plan.threads, plan.device)
    if options.executor == "threads":
        return ThreadExecutor(plan.workers, plan.threads, plan.device)
    if options.executor == "processes":
        return ProcessExecutor(plan.workers)
    # Only a run on Ray loads ray.
    from disthess.execute.ray_executor import RayExecutor

    return RayExecutor(plan.workers, plan.threads, plan.device, options.address)


def _job(store: Store, prepared: Prepared) -> AbstractJob:
    plan = prepared.plan
    path = store.path
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
        shown = "; ".join(
            f"tile {tile} ({plan.layout.tiles[tile].place}): {message}" for tile, message in outcome.failures[:3]
        )
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
