"""One symmetric operator in few numbers, each with an interval and how it was made."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np

from disthess.linalg.estimate import WHOLE, Estimate
from disthess.linalg.lanczos import BLOCK, DENSE_SIZE, basis_bytes, block_width, extreme_eigenpairs
from disthess.linalg.moments import (
    LEAST_PROBES,
    Moments,
    Ranged,
    estimate_moments,
    exact_moments,
    moments_products,
    stable_rank,
)
from disthess.linalg.operator import AbstractSymmetricOperator
from disthess.linalg.quadrature import (
    Quadratures,
    Spread,
    ends,
    quadrature_bytes,
    share_below,
    smooth,
    smooth_eigenvalues,
    take_quadratures,
)

DENSE = 300
"""Entries up to which an operator is formed and decomposed."""

DENSITY = "density"
"""What is asked for beside the metrics: a curve."""

_ENDS = frozenset({"lambda_max", "lambda_min", "stable_rank", "negative_mass"})
_MOMENTS = frozenset({"trace", "frobenius", "effective_rank", "stable_rank"})
_SHARES = frozenset({"negative_mass", DENSITY})

SUMMARY = ("lambda_max", "lambda_min", "trace", "frobenius", "effective_rank", "stable_rank", "negative_mass", DENSITY)
"""Everything that a summary may hold."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much work goes into a summary, and what chance it uses.

    Attributes:
        probes: Products for trace, norm and effective rank, in three equal parts.
        density_probes: Random vectors for density and negative mass.
        density_steps: Lanczos steps of each.
        tolerance: Residual of an extreme eigenvalue over the largest magnitude, at which it is found.
        max_products: For the two of them, after which they are what they are; their residuals say how far that is.
        steps: Products for the two of them, taken whatever their residuals, in place of ``max_products``: what a summary costs is
            then known before. In whole blocks, see `disthess.linalg.lanczos.block_width`.
        memory_bytes: For vectors that are kept.
        confidence: Of each interval by itself.
        seed: Of all random vectors.
    """

    probes: int = 48
    density_probes: int = 8
    density_steps: int = 40
    tolerance: float = 1e-4
    max_products: int = 400
    memory_bytes: int = 2**31
    confidence: float = 0.95
    seed: int = 0
    steps: int | None = None

    def trouble(self) -> str:
        """What is wrong with it, in words; empty if nothing is."""
        if self.probes < LEAST_PROBES:
            return f"probes must be at least {LEAST_PROBES}, got {self.probes}"
        for name in ("density_probes", "density_steps", "max_products", "memory_bytes"):
            if getattr(self, name) < 1:
                return f"{name} must be positive, got {getattr(self, name)}"
        if self.steps is not None and self.steps < 1:
            return f"steps must be positive, got {self.steps}"
        if not 0 < self.confidence < 1 or not 0 < self.tolerance < 1:
            return f"confidence and tolerance must be between 0 and 1, got {self.confidence} and {self.tolerance}"
        return ""


@dataclass(frozen=True, slots=True)
class Summary:
    """What `summarise_operator` found.

    Attributes:
        estimates: One per metric asked for.
        spread: The density, where it was asked for.
        products: Products taken.
        moments: The vectors behind trace and norm, for what else can be learnt from them; None for a dense operator.
        eigenvalues: All of them, of a dense operator.
    """

    estimates: tuple[Estimate, ...]
    spread: Spread | None
    products: int
    moments: Moments | None
    eigenvalues: np.ndarray | None

    def value(self, metric: str) -> float:
        """The number; NaN where it was not asked for."""
        return next((found.value for found in self.estimates if found.metric == metric), np.nan)


def summary_products(size: int, effort: Effort, metrics: Iterable[str] = SUMMARY) -> dict[str, int]:
    """Products that `summarise_operator` takes at most, by what they are for: ``moments``, ``ends``, ``density`` or ``dense``."""
    wanted = frozenset(metrics)
    if not wanted & frozenset(SUMMARY):
        return {}
    if size <= max(DENSE, effort.probes):
        return {"dense": size}
    found = {}
    if wanted & _MOMENTS:
        found["moments"] = moments_products(size, effort.probes)
    if wanted & _ENDS and _has_room(size, effort):
        found["ends"] = size + 2 if size <= DENSE_SIZE else _ends_products(size, effort)
    if wanted & _SHARES or (wanted & _ENDS and not _has_room(size, effort)):
        found["density"] = effort.density_probes * min(effort.density_steps, size)
    return found


def ends_open(size: int, effort: Effort) -> bool:
    """Whether the products for extreme eigenvalues end when these converge, and not after a number that is known before.

    >>> ends_open(1000, Effort()), ends_open(1000, Effort(steps=64)), ends_open(500, Effort())
    (True, False, False)
    """
    return effort.steps is None and size > DENSE_SIZE


def _ends_products(size: int, effort: Effort) -> int:
    """At most; exactly where there are ``steps``. Two more measure what was found."""
    if effort.steps is None:
        return min(effort.max_products, size) + BLOCK + 2
    width = block_width(size, 1)
    return width * -(-effort.steps // width) + 2


def summary_bytes(size: int, effort: Effort, metrics: Iterable[str] = SUMMARY) -> int:
    """What `summarise_operator` keeps at most: the largest of its parts, each with a few blocks of vectors beside."""
    parts = summary_products(size, effort, metrics)
    kept = {
        "dense": 3 * size * size * 8,
        "moments": 6 * (effort.probes // 3) * size * 8,
        "ends": basis_bytes(size, 1, "both", effort.memory_bytes) + 6 * BLOCK * size * 8,
        "density": quadrature_bytes(size, effort.density_probes, effort.density_steps, effort.memory_bytes),
    }
    return max((kept[part] for part in parts), default=0)


def summarise_operator(
    operator: AbstractSymmetricOperator,
    *,
    block: str = WHOLE,
    effort: Effort | None = None,
    metrics: Iterable[str] = SUMMARY,
    watch: Callable[[int, float], None] | None = None,
    phase: Callable[[str], AbstractContextManager[None]] = lambda part: nullcontext(),
) -> Summary:
    """Extreme eigenvalues, trace, Frobenius norm, effective and stable rank, negative mass and density.

    Up to 300 entries the matrix is formed and all of it is exact. Beyond, each number has the interval that its method gives:
    `disthess.linalg.moments`, `disthess.linalg.quadrature`, `disthess.linalg.lanczos`. That of an extreme eigenvalue reaches from
    what was found, which no vector can exceed, to its residual, within which an eigenvalue lies; that there is none beyond is no
    theorem, but follows with near certainty from the random start.

    Args:
        operator: Symmetric.
        block: Whose estimates they are to be.
        effort: How much work.
        metrics: Out of `SUMMARY`.
        watch: As for `disthess.linalg.lanczos.extreme_eigenpairs`.
        phase: Entered for each part of `summary_products` that is computed, by its name.

    Raises:
        ValueError: The effort is not one.

    Example:
        >>> from disthess.linalg.operator import DenseOperator
        >>> found = summarise_operator(DenseOperator(np.diag([3.0, -1.0])))
        >>> found.value("lambda_max"), found.value("trace"), found.value("negative_mass")
        (3.0, 2.0, 0.5)
    """
    effort = Effort() if effort is None else effort
    if effort.trouble():
        raise ValueError(effort.trouble())
    wanted = tuple(metrics)
    parts = summary_products(operator.size, effort, wanted)
    if "dense" in parts:
        with phase("dense"):
            return _dense(operator, block, wanted)
    made = _Made(operator, block, effort)
    moments, taken = None, None
    if "moments" in parts:
        with phase("moments"):
            moments = estimate_moments(operator, probes=effort.probes, confidence=effort.confidence, seed=effort.seed)
            made.add_moments(moments)
    if "density" in parts:
        with phase("density"):
            taken = take_quadratures(
                operator,
                probes=effort.density_probes,
                steps=effort.density_steps,
                seed=effort.seed + 1,
                memory_bytes=effort.memory_bytes,
            )
            made.products += taken.products
    if frozenset(wanted) & _ENDS:
        with phase("ends") if "ends" in parts else nullcontext():
            made.add_ends(taken, moments, watch)
    if taken is not None and "negative_mass" in wanted:
        made.add_negative_mass(taken)
    spread = smooth(taken) if taken is not None and DENSITY in wanted else None
    found = tuple(entry for entry in made.estimates if entry.metric in wanted)
    return Summary(found, spread, made.products, moments, None)


def _has_room(size: int, effort: Effort) -> bool:
    """Whether the least basis of block Lanczos fits."""
    return basis_bytes(size, 1, "both", effort.memory_bytes) <= effort.memory_bytes


def _zero(operator: AbstractSymmetricOperator) -> float:
    """How small an eigenvalue is none, relative to the largest magnitude."""
    return 1e-9 if operator.dtype == np.float64 else 1e-5


def _dense(operator: AbstractSymmetricOperator, block: str, wanted: tuple[str, ...]) -> Summary:
    matrix = np.asarray(operator.matmat(np.eye(operator.size, dtype=operator.dtype)), dtype=np.float64)
    values = np.linalg.eigvalsh(0.5 * (matrix + matrix.T))
    trace, frobenius, rank = exact_moments(values)
    norm = float(np.abs(values).max())
    negative = float((values < -_zero(operator) * norm).mean())
    numbers = {
        "lambda_max": float(values[-1]),
        "lambda_min": float(values[0]),
        "trace": trace.value,
        "frobenius": frobenius.value,
        "effective_rank": rank.value,
        "stable_rank": stable_rank(frobenius, Ranged.exactly(norm)).value,
        "negative_mass": negative,
    }
    how = f"all {len(values)} eigenvalues of the exact matrix"
    found = tuple(
        Estimate(metric, block, value, value, value, 1.0, how) for metric, value in numbers.items() if metric in wanted
    )
    spread = smooth_eigenvalues(values) if DENSITY in wanted else None
    return Summary(found, spread, operator.size, None, values)


class _Made:
    """Estimates of one operator as they are made."""

    def __init__(self, operator: AbstractSymmetricOperator, block: str, effort: Effort) -> None:
        self.operator = operator
        self.effort = effort
        self.estimates: list[Estimate] = []
        self.products = 0
        self._block = block
        self._ends: tuple[Ranged, Ranged] | None = None
        self._norm = 0.0

    def add_moments(self, moments: Moments) -> None:
        self.products += moments.products
        how = f"Hutch++, {moments.products} products"
        self._add("trace", moments.trace, how)
        self._add("frobenius", moments.frobenius, how)
        self._add("effective_rank", moments.effective_rank, how)

    def add_ends(
        self, taken: Quadratures | None, moments: Moments | None, watch: Callable[[int, float], None] | None
    ) -> None:
        if _has_room(self.operator.size, self.effort):
            low, high, how = self._by_blocks(watch)
        elif taken is not None:
            low, high = ends(taken)
            how = f"{len(taken.each)} Lanczos runs of {max(len(one.nodes) for one in taken.each)} steps"
        else:
            return
        norm = max(abs(low.value), abs(high.value))
        # A node is inside the spectrum up to rounding; an eigenvalue lies within its residual.
        slip = 8 * float(np.finfo(self.operator.dtype).eps) * norm
        self._ends, self._norm = (low, high), norm
        for metric, one in (("lambda_max", high), ("lambda_min", low)):
            residual = max(one.high - one.value, one.value - one.low)
            text = f"{how}, residual {residual:.1e}"
            self._add(metric, Ranged(one.value, one.low - slip, one.high + slip), text)
        if moments is not None:
            reach = max(high.high, -low.low, norm)
            rank = stable_rank(moments.frobenius, Ranged(norm, norm, reach))
            self._add("stable_rank", rank, f"Frobenius norm of {moments.products} products over the largest magnitude")

    def add_negative_mass(self, taken: Quadratures) -> None:
        place = -_zero(self.operator) * self._norm
        steps = max(len(one.nodes) for one in taken.each)
        how = f"{len(taken.each)} Lanczos quadratures of {steps} steps; the interval holds what they cannot resolve"
        found = share_below(taken, place, confidence=self.effort.confidence)
        if self._ends is not None and self._ends[0].low >= place:
            found, how = Ranged.exactly(0.0), "the smallest eigenvalue is not negative"
        elif self._ends is not None and self._ends[1].high < place:
            found, how = Ranged.exactly(1.0), "the largest eigenvalue is negative"
        elif self._norm == 0:
            found = Ranged.exactly(0.0)
        self._add("negative_mass", found, how)

    def _by_blocks(self, watch: Callable[[int, float], None] | None) -> tuple[Ranged, Ranged, str]:
        effort = self.effort
        tolerance = max(effort.tolerance, 1e-12 if self.operator.dtype == np.float64 else 1e-6)
        found = extreme_eigenpairs(
            self.operator, 1, seed=effort.seed, tolerance=tolerance, memory_bytes=effort.memory_bytes,
            max_products=effort.max_products, steps=effort.steps, watch=watch,
        )  # fmt: skip
        self.products += found.products
        (bottom, top), (under, over) = found.values, found.residuals
        way = "the exact matrix" if self.operator.size <= DENSE_SIZE else "block Lanczos"
        how = f"{way}, {found.products} products{'' if found.converged.all() else ', not within its tolerance'}"
        return (
            Ranged(float(bottom), float(bottom - under), float(bottom)),
            Ranged(float(top), float(top), float(top + over)),
            how,
        )

    def _add(self, metric: str, ranged: Ranged, how: str) -> None:
        self.estimates.append(
            Estimate(metric, self._block, ranged.value, ranged.low, ranged.high, self.effort.confidence, how)
        )
