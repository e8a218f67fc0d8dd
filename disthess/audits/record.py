"""What one audit of one checkpoint found: a frozen value that a history keeps, alerts judge and reports show."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from disthess.linalg.estimate import WHOLE as WHOLE
from disthess.linalg.estimate import Estimate as Estimate


@dataclass(frozen=True, slots=True)
class Alert:
    """One rule that one audit broke.

    Attributes:
        rule: The rule's name in the audit file.
        metric: Of the estimate that broke it.
        block: Its block.
        value: What was measured.
        limit: What the rule allows.
        message: One sentence: what was measured, what is allowed, against which audit.
    """

    rule: str
    metric: str
    block: str
    value: float
    limit: float
    message: str


@dataclass(frozen=True, slots=True)
class BlockDensity:
    """How the spectral density of a block was made; the curve itself is among the arrays.

    Attributes:
        block: Whose.
        products: Hessian-vector products behind it; those of negative mass, or of a block that was formed, are the same ones.
        seed: Of its random vectors; None where it is exact.
        how: In a sentence.
    """

    block: str
    products: int
    seed: int | None
    how: str


@dataclass(frozen=True, slots=True)
class DensityCurve:
    """A spectral density that integrates to 1.

    Attributes:
        grid: Where, ``[points]``.
        value: Density there.
        error: Standard error; 0 where it is exact.
    """

    grid: np.ndarray
    value: np.ndarray
    error: np.ndarray

    @property
    def mean(self) -> float:
        """Of the eigenvalues; the trace over their number."""
        return float(np.trapezoid(self.value * self.grid, self.grid))

    @property
    def deviation(self) -> float:
        """Their standard deviation, that of the smoothing included."""
        return math.sqrt(max(float(np.trapezoid(self.value * (self.grid - self.mean) ** 2, self.grid)), 0.0))


@dataclass(frozen=True, slots=True)
class MapFacts:
    """How a coupling map was made; its numbers are among the arrays.

    Attributes:
        confidence: Of each interval by itself.
        probes: Random vectors of each block; one of no more entries than that is exact.
        seed: Of them.
        products: Hessian-vector products taken.
    """

    confidence: float
    probes: int
    seed: int
    products: int


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """One audit.

    Attributes:
        key: Identity of checkpoint, data and settings, hexadecimal: an audit with a key that a history has is not made again.
        checkpoint: Name of the checkpoint, as tables show it.
        step: Of training, read from the name; None if it has none.
        taken: When, UTC, ISO 8601.
        seconds: It took.
        products: Hessian-vector products it took.
        facts: Texts by name: hashes of data and settings, seed, versions, attention kernel, device.
        estimates: The numbers.
        blocks: Names of the blocks of the coupling map, in its order; empty where there is none.
        arrays: By name, float64: ``density/grid``, ``density/value``, ``density/error`` (one-dimensional, one length);
            ``coupling/value``, ``coupling/low``, ``coupling/high`` and the same of ``norm`` (``[n, n]`` for ``n`` blocks), and
            of ``trace`` (``[n]``, which older audits have not); exact blocks as ``tile/<name>`` (two-dimensional); and the
            densities of blocks as ``block_density/grid``, ``block_density/value``, ``block_density/error``, one row for each of
            ``densities``.
        alerts: Rules that it broke.
        densities: Blocks with a spectral density, in the order of its rows; empty in audits that were not asked for any.
        map_facts: Of the coupling map; None where there is none, and in older audits.
        parts: Products by what they were for, forms of the Gauss-Newton matrix too, which ``products`` does not count; empty in
            older audits.
    """

    key: str
    checkpoint: str
    step: int | None
    taken: str
    seconds: float
    products: int
    facts: Mapping[str, str]
    estimates: tuple[Estimate, ...]
    blocks: tuple[str, ...] = ()
    arrays: Mapping[str, np.ndarray] = field(default_factory=lambda: MappingProxyType({}))
    alerts: tuple[Alert, ...] = ()
    densities: tuple[BlockDensity, ...] = ()
    map_facts: MapFacts | None = None
    parts: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    def find(self, metric: str, block: str = WHOLE) -> Estimate | None:
        """The estimate of that metric and block; None where it was not measured."""
        return next((found for found in self.estimates if (found.metric, found.block) == (metric, block)), None)

    def value(self, metric: str, block: str = WHOLE) -> float:
        """Its number; NaN where it was not measured."""
        found = self.find(metric, block)
        return math.nan if found is None else found.value

    def map_traces(self) -> tuple[Estimate, ...]:
        """Traces of the blocks of the coupling map, each with its interval; none where they were not kept."""
        made, names = self.map_facts, [f"trace/{end}" for end in ("value", "low", "high")]
        if made is None or not set(names) <= set(self.arrays):
            return ()
        arrays = [np.asarray(self.arrays[name]) for name in names]
        if any(array.shape != (len(self.blocks),) for array in arrays):
            return ()
        how = f"{made.probes} random vectors of the block"
        rows = zip(self.blocks, *(array.tolist() for array in arrays), strict=True)
        return tuple(
            Estimate("map_trace", block, value, low, high, made.confidence, how) for block, value, low, high in rows
        )

    def density(self, block: str = WHOLE) -> DensityCurve | None:
        """The spectral density of the whole model or of a block; None where it was not measured, or is not a curve."""
        kind, row = ("density", None) if block == WHOLE else ("block_density", self._row(block))
        names = [f"{kind}/{name}" for name in ("grid", "value", "error")]
        if (block != WHOLE and row is None) or not set(names) <= set(self.arrays):
            return None
        arrays = [np.asarray(self.arrays[name]) for name in names]
        if row is not None:
            if any(array.ndim != 2 or len(array) != len(self.densities) for array in arrays):
                return None
            arrays = [array[row] for array in arrays]
        grid, value, error = arrays
        if grid.ndim != 1 or not len(grid) or not grid.shape == value.shape == error.shape:
            return None
        return DensityCurve(grid, value, error) if np.isfinite([grid, value]).all() else None

    def _row(self, block: str) -> int | None:
        return next((row for row, made in enumerate(self.densities) if made.block == block), None)
