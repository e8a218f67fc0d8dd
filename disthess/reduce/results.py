"""Spectra, densities, low rank and traces of a store or of any operator; a store keeps what was found."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import psutil
from scipy.sparse.linalg import LinearOperator

from disthess.errors import ConfigError, PlanError
from disthess.execute.memory import available_memory_bytes
from disthess.execute.product_progress import ProductProgress, product_listener
from disthess.linalg import density, lanczos, lowrank
from disthess.linalg.lanczos import EigenResult, Which
from disthess.linalg.lowrank import LowRankResult
from disthess.linalg.operator import AbstractSymmetricOperator, ScipyOperator
from disthess.linalg.solve import SolveResult, solve_dense, solve_iterative, solve_low_rank
from disthess.linalg.trace import TraceResult, estimate_trace
from disthess.reduce.arrays import PanelReader
from disthess.reduce.hessian_store import HessianStore, check_store
from disthess.reduce.keep import keep, kept
from disthess.reduce.truncate import TruncatedBlocks, truncate_blocks
from disthess.types import DType, Part
from disthess.units import human_bytes

_SCALARS = ("error", "standard_error", "relative_error", "frobenius_bound", "spectral_bound", "products")

Target: TypeAlias = HessianStore | LinearOperator | AbstractSymmetricOperator
"""A store, or anything symmetric that multiplies vectors."""


def eigenvalues(
    target: Target,
    k: int = 10,
    *,
    which: Which = "both",
    part: Part = "hessian",
    vectors: bool = False,
    seed: int = 0,
    tolerance: float | None = None,
    memory_bytes: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: ProductProgress = None,
) -> EigenResult:
    """Extreme eigenvalues of a Hessian, with the residual of each.

    Args:
        target: A store, an operator such as `disthess.operator` makes, or any symmetric ``LinearOperator``.
        k: How many at each end asked for.
        which: ``both`` ends, ``largest`` or ``smallest``.
        part: Of a store.
        vectors: Whether to return eigenvectors, ``[P, k]``.
        seed: Of the start vector.
        tolerance: Relative residual; see `extreme_eigenpairs`. A store in float32 is multiplied in float32 unless one is given.
        memory_bytes: What the vectors kept between steps may take; fewer of them take more passes over the store. Default and
            least: `disthess.linalg.lanczos.basis_bytes`, but by default no more than half of the memory that is free.
        checkpoint: A file that keeps the state of a long iteration, saved between steps at most every 30 s. Where it is there, the
            iteration goes on from it, and ends with the same bits as one that was never stopped. It is refused where it belongs
            to another question: size, dtype, k, which, seed, tolerance, or H times a fixed vector differ.
        progress: True for a line now and then, or a function that is called with the products done so far.

    Returns:
        Values ascending, each within its residual of an eigenvalue (``intervals``), and whether they converged. From a store they
        are kept under ``spectrum/`` and found again.

    Raises:
        ConfigError: ``k``, ``which`` or the checkpoint is wrong.
        PlanError: Not even the least vectors fit into memory.
        StoreError: The store is incomplete.
    """
    settings = {"k": k, "which": which, "part": part, "seed": seed, "vectors": vectors, "tolerance": tolerance}
    old = kept(target, f"spectrum/{part}/{which}-{k}", settings)
    if old is not None:
        arrays, values = old
        return EigenResult(
            arrays["values"], arrays["residuals"], arrays.get("vectors"), int(values["products"]),
            arrays["converged"].astype(bool), float(values["tolerance_used"]),
        )  # fmt: skip
    # The default tolerance of a float32 store leaves room for the rounding of float32 products; one that is given may not.
    matrix = _operator(target, part, "float32" if tolerance is None else "float64")
    found = _checked(
        lanczos.extreme_eigenpairs,
        matrix,
        k,
        which=which,
        seed=seed,
        tolerance=tolerance,
        vectors=vectors,
        memory_bytes=_basis_room(matrix.size, k, which) if memory_bytes is None else memory_bytes,
        checkpoint=checkpoint,
        notify=product_listener(progress),
    )
    arrays = {"values": found.values, "residuals": found.residuals, "converged": found.converged.astype(np.uint8)}
    if found.vectors is not None:
        arrays["vectors"] = found.vectors
    keep(
        target,
        f"spectrum/{part}/{which}-{k}",
        settings,
        arrays,
        {"products": found.products, "tolerance_used": found.tolerance},
    )
    return found


def spectral_density(
    target: Target, *, part: Part = "hessian", probes: int = 8, steps: int = 40, seed: int = 0, points: int = 400
) -> density.DensityResult:
    """Spectral density of a Hessian by block stochastic Lanczos quadrature; integrates to one.

    Args:
        target: A store, an operator such as `disthess.operator` makes, or any symmetric ``LinearOperator``.
        part: Of a store.
        probes: Random start vectors.
        steps: Block Lanczos steps.
        seed: Of the start vectors.
        points: Of the grid.

    Raises:
        ConfigError: A count is not positive.
        PlanError: The vectors do not fit into memory.
        StoreError: The store is incomplete.
    """
    settings = {"probes": probes, "steps": steps, "part": part, "seed": seed, "points": points}
    old = kept(target, f"spectrum/{part}/density", settings)
    if old is not None:
        arrays, values = old
        return density.DensityResult(
            **arrays,
            width=float(values["width"]),
            products=int(values["products"]),
            truncation=float(values.get("truncation", "nan")),
        )
    matrix = _operator(target, part, "float32")
    _check_room(matrix.size, (min(max(probes, 0) * max(steps, 0), matrix.size) + 4 * probes), "probes or steps")
    found = _checked(
        density.spectral_density,
        matrix,
        probes=probes,
        steps=steps,
        seed=seed,
        points=points,
    )
    arrays = {name: getattr(found, name) for name in ("grid", "density", "standard_error", "nodes", "weights")}
    scalars = {"width": found.width, "products": found.products}
    if np.isfinite(found.truncation):
        scalars["truncation"] = found.truncation
    keep(target, f"spectrum/{part}/density", settings, arrays, scalars)
    return found


def low_rank(
    target: Target,
    rank: int,
    *,
    method: lowrank.Method = "randomised",
    part: Part = "hessian",
    oversample: int = 10,
    power: int = 1,
    seed: int = 0,
) -> LowRankResult:
    """``H ~ V diag(values) V^T`` with what is left out, and bounds of it.

    Args:
        target: A store, an operator such as `disthess.operator` makes, or any symmetric ``LinearOperator``.
        rank: Wanted.
        method: ``randomised`` (a few passes over the store), ``exact`` (the eigenpairs of largest magnitude: the best there is), or
            ``nystrom`` (generalised Nystroem: one pass).
        part: Of a store.
        oversample: Random vectors beyond the rank.
        power: Power iterations of ``randomised``.
        seed: Of the random vectors.

    Returns:
        Values, vectors, error and bounds; `disthess.solve` takes it. From a store it is kept under ``lowrank/`` and found again.

    Raises:
        ConfigError: ``rank`` is not positive.
        PlanError: The vectors do not fit into memory.
        StoreError: The store is incomplete.
    """
    settings = {"rank": rank, "part": part, "oversample": oversample, "power": power, "seed": seed}
    place = f"lowrank/{part}/{method}-{rank}"
    old = kept(target, place, settings)
    if old is not None:
        arrays, values = old
        return LowRankResult(arrays["values"], arrays["vectors"], method, **{name: values[name] for name in _SCALARS})
    # The norm takes a pass of its own, which is what the Nystroem form does without.
    whole = target.blocks(part).frobenius if isinstance(target, HessianStore) and method != "nystrom" else None
    matrix = _operator(target, part)
    _check_room(matrix.size, 4 * (min(rank, matrix.size) + oversample + lowrank.ERROR_PROBES), "ranks")
    found = _checked(
        lowrank.low_rank,
        matrix,
        rank,
        method=method,
        oversample=oversample,
        power=power,
        seed=seed,
        frobenius=whole,
    )
    scalars = {name: getattr(found, name) for name in _SCALARS}
    keep(target, place, settings, {"values": found.values, "vectors": found.vectors}, scalars)
    return found


def low_rank_blocks(
    store: HessianStore,
    *,
    rank: int | None = None,
    tolerance: float = 0.0,
    bounds: Mapping[tuple[str, str], int] | None = None,
    part: Part = "hessian",
) -> TruncatedBlocks:
    """Every block truncated by itself: off the diagonal by singular values, on it by eigenvalues of largest magnitude.

    Args:
        store: A complete store.
        rank: Most kept of each block.
        tolerance: Singular values at most this times ``|H|_F`` are dropped.
        bounds: Most kept by pair, such as `disthess.rank_bounds` gives: what that drops is zero.
        part: Which matrix.

    Returns:
        Factors of each block, the error ``(sum_v tail_vv + 2 sum_v<w tail_vw)^1/2`` in Frobenius norm, which is exact, and
        a bound in spectral norm.

    Raises:
        ConfigError: It is no store; neither rank, tolerance nor bounds, or a negative one.
        StoreError: The store is incomplete.
    """
    check_store(store)
    if rank is None and bounds is None and tolerance == 0.0:
        raise ConfigError(
            "low_rank_blocks needs a rank, a tolerance or bounds; for what is free give rank_bounds(problem)."
        )
    if (rank is not None and rank < 0) or tolerance < 0:
        raise ConfigError(f"rank and tolerance must not be negative, got {rank!r} and {tolerance!r}.")
    sizes = {parameter.name: parameter.numel for parameter in store.parameters}

    def wanted(a: str, b: str) -> int:
        free = min(sizes[a], sizes[b]) if bounds is None else bounds.get((a, b), min(sizes[a], sizes[b]))
        return free if rank is None else min(rank, free)

    norm = store.blocks(part).frobenius
    return truncate_blocks(PanelReader(store.store, part), wanted, tolerance * norm, norm)


def solve(
    target: Target | LowRankResult,
    b: np.ndarray,
    damping: float = 0.0,
    *,
    part: Part = "hessian",
    dense_bytes: int | None = None,
) -> SolveResult:
    """``x`` of ``(H + damping I) x = b``: factorised in memory where that fits, else by MINRES over the store.

    Negative curvature is found and reported: the solution is then no minimiser of a quadratic model.

    Args:
        target: A store, an operator, any symmetric ``LinearOperator``, or the result of `low_rank`, solved exactly in its own form.
        b: ``[P]``.
        damping: In the units of the Hessian.
        part: Of a store.
        dense_bytes: Memory that a factorisation may take; default a quarter of what is free. 0 asks for MINRES.

    Raises:
        ConfigError: ``b`` has another size or is not finite, or the damped matrix is singular.
        StoreError: The store is incomplete.
    """
    right = np.asarray(b, dtype=np.float64)
    size = len(target.vectors) if isinstance(target, LowRankResult) else _operator(target, part).size
    if right.shape != (size,):
        raise ConfigError(
            f"b has {right.size} entries (shape {right.shape}), and the matrix {size} rows; give a vector of {size}."
        )
    if not np.isfinite(right).all() or not np.isfinite(damping):
        raise ConfigError("b and damping must be finite; got NaN or infinity. Check where they come from.")
    if isinstance(target, LowRankResult):
        return _checked(solve_low_rank, target, right, damping)
    room = psutil.virtual_memory().available // 4 if dense_bytes is None else dense_bytes
    if isinstance(target, HessianStore) and 24 * size * size <= room:
        return _checked(solve_dense, target.dense(part), right, damping)
    return solve_iterative(_operator(target, part), right, damping)


def trace(
    target: Target, *, part: Part = "hessian", probes: int = 48, seed: int = 0, tolerance: float | None = None
) -> TraceResult:
    """Trace of a Hessian: exact from a store, estimated with its standard error (Hutch++) from an operator.

    Args:
        target: A store, an operator such as `disthess.operator` makes, or any symmetric ``LinearOperator``.
        part: Of a store.
        probes: Products, about.
        seed: Of the random signs.
        tolerance: Relative standard error to go on to, up to 20 times as many products; ``converged`` says whether it was met.

    Raises:
        ConfigError: Too few probes, or a tolerance that is not positive.
        PlanError: The vectors do not fit into memory.
        StoreError: The store is incomplete.
    """
    if isinstance(target, HessianStore):
        return TraceResult(target.blocks(part).trace, 0.0, 0)
    matrix = _operator(target, part)
    _check_room(matrix.size, 5 * min(probes // 3, matrix.size), "probes")
    return _checked(estimate_trace, matrix, probes=probes, seed=seed, tolerance=tolerance)


def _operator(target: Target, part: Part, multiply: DType = "float64") -> AbstractSymmetricOperator:
    if isinstance(target, HessianStore):
        return target.symmetric_operator(part, multiply)
    if isinstance(target, AbstractSymmetricOperator):
        return target
    if isinstance(target, LinearOperator):
        return ScipyOperator(target)
    raise ConfigError(
        f"expected a store, an operator (disthess.operator makes one of a problem) or a symmetric LinearOperator, got "
        f"{type(target).__name__}."
    )


def _check_room(size: int, vectors: int, fewer: str) -> None:
    """Refuse what would be killed for its memory.

    Raises:
        PlanError: So many vectors of float64 do not fit into what is free.
    """
    needed, free = 8 * size * vectors, available_memory_bytes()
    if needed > free:
        raise PlanError(
            f"that takes about {vectors} vectors of {size:,} entries at once, {human_bytes(needed)}, and {human_bytes(free)} are "
            f"free. Ask for fewer {fewer}."
        )


def _basis_room(size: int, k: int, which: Which) -> int | None:
    """Half of the free memory where the default would take more; None where it would not."""
    free = available_memory_bytes()
    if k < 1 or lanczos.basis_bytes(size, k, which) <= free // 2:
        return None
    least = lanczos.basis_bytes(size, k, which, 0)
    if least > free:
        raise PlanError(
            f"the least that Lanczos needs for k={k}, which={which!r} and {size:,} rows is {human_bytes(least)} of vectors, and "
            f"{human_bytes(free)} are free. Ask for fewer eigenvalues or for one end."
        )
    return free // 2


def _checked(function: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except ValueError as reason:
        raise ConfigError(f"{reason}.") from reason
