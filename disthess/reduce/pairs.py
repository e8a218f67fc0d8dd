"""Numbers that say how much two blocks have to do with each other, for every pair of parameters, activations or sections.

With ``H_vw`` a block, ``|.|`` the Frobenius norm and ``|.|_2`` the spectral norm:

    resonance    R = |H_vw|                             in the objective's own scale
    coupling     C = |H_vw| / sqrt(|H_vv| |H_ww|)       0 where the two are independent; no upper bound in general
    stable rank  D = |H_vw|^2 / |H_vw|_2^2              between 1 and the rank
    gap          |H_vw - G_vw| / |G_vw|                 G the generalised Gauss-Newton block: what that leaves out
    trace        of diagonal blocks
"""

from __future__ import annotations

import abc
import csv
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import numpy as np
from scipy.sparse.linalg import svds
from typing_extensions import override

from disthess.errors import ConfigError
from disthess.reduce.arrays import PanelReader, block
from disthess.store.store import Store
from disthess.types import Part

PairOf = Literal["parameters", "activations", "sections"]
Metric = Literal["norm", "coupling", "stable_rank", "gap", "trace"]
METRICS: tuple[Metric, ...] = ("norm", "coupling", "stable_rank", "gap", "trace")

DENSE_SIDE = 512
"""Blocks with a side up to this get their spectral norm from a full decomposition, others by Lanczos to 1e-6."""


class AbstractBlockSource(abc.ABC):
    """Named blocks of a symmetric matrix."""

    @property
    @abc.abstractmethod
    def sizes(self) -> Mapping[str, int]:
        """Entries by name, in order."""

    @property
    @abc.abstractmethod
    def has_gap(self) -> bool:
        """Whether both the Hessian and its Gauss-Newton part can be read."""

    @abc.abstractmethod
    def block(self, a: str, b: str, part: Part) -> np.ndarray:
        """``[sizes[a], sizes[b]]``."""


@final
class ParameterBlocks(AbstractBlockSource):
    """The blocks of a store's parameters."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._readers: dict[Part, PanelReader] = {}
        self._sizes = {parameter.name: parameter.numel for parameter in store.layout.parameters}

    @property
    @override
    def sizes(self) -> Mapping[str, int]:
        return self._sizes

    @property
    @override
    def has_gap(self) -> bool:
        return len(self._store.layout.parts) > 1

    @override
    def block(self, a: str, b: str, part: Part) -> np.ndarray:
        if part not in self._readers:
            self._readers[part] = PanelReader(self._store, part)
        reader = self._readers[part]
        return block(reader, reader.resolve(a), reader.resolve(b))


@dataclass(frozen=True, slots=True)
class PairRow:
    """One pair; NaN where a number is not defined, or its part is not stored.

    Attributes:
        a: Earlier name.
        b: Later name, or the same.
        entries: Of the block.
        norm: R.
        coupling: C.
        stable_rank: D.
        gap: ``|residual| / |ggn|``; infinite where the ggn is zero and the residual is not.
        trace: Of a diagonal block.
    """

    a: str
    b: str
    entries: int
    norm: float
    coupling: float
    stable_rank: float
    gap: float
    trace: float


@final
@dataclass(frozen=True, slots=True)
class PairTable:
    """All pairs, each once.

    Attributes:
        part: Whose blocks.
        of: What the names are.
        names: In order.
        rows: ``a`` no later than ``b``.
    """

    part: Part
    of: PairOf
    names: tuple[str, ...]
    rows: tuple[PairRow, ...]

    def matrix(self, metric: Metric = "norm") -> np.ndarray:
        """``[names, names]``, symmetric.

        Raises:
            ConfigError: There is no such metric.
        """
        place = {name: index for index, name in enumerate(self.names)}
        found = np.full((len(self.names), len(self.names)), math.nan)
        for row in self.rows:
            value = _value(row, metric)
            found[place[row.a], place[row.b]] = found[place[row.b], place[row.a]] = value
        return found

    def largest(self, count: int, metric: Metric = "norm") -> tuple[PairRow, ...]:
        """The pairs with the largest magnitude; undefined ones last."""
        return tuple(sorted(self.rows, key=lambda row: _order(_value(row, metric)))[:count])

    def to_csv(self) -> str:
        """A header and one line per pair; undefined numbers are empty."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(PairRow.__slots__)
        for row in self.to_json():
            writer.writerow(["" if value is None else value for value in row.values()])
        return out.getvalue()

    def to_json(self) -> list[dict[str, Any]]:
        """One dict per pair; undefined numbers are None, infinite ones the string ``Infinity``."""
        return [{name: _plain(getattr(row, name)) for name in PairRow.__slots__} for row in self.rows]


def pair_table(
    source: AbstractBlockSource, part: Part, of: PairOf, progress: Callable[[int, int], None] | None = None
) -> PairTable:
    """Every metric of every pair; each block is read once (and its Gauss-Newton part once, for the gap).

    Args:
        source: Where blocks come from.
        part: Whose blocks; the gap is always that of the Hessian.
        of: What the names are.
        progress: Called with (pairs done, pairs in all).
    """
    names = tuple(source.sizes)
    found: list[tuple[str, str, int, float, float, float, float]] = []
    total = len(names) * (len(names) + 1) // 2
    for i, a in enumerate(names):
        for b in names[i:]:
            values = np.asarray(source.block(a, b, part), dtype=np.float64)
            norm = float(np.linalg.norm(values))
            rank = norm**2 / spectral_norm(values) ** 2 if norm else math.nan
            trace = float(np.trace(values)) if a == b else math.nan
            gap = _gap(source, a, b) if source.has_gap else math.nan
            found.append((a, b, values.size, norm, rank, gap, trace))
            if progress is not None:
                progress(len(found), total)
    own = {a: norm for a, b, _, norm, *_ in found if a == b}
    rows = tuple(
        PairRow(a, b, entries, norm, _coupling(norm, own[a], own[b]), rank, gap, trace)
        for a, b, entries, norm, rank, gap, trace in found
    )
    return PairTable(part, of, names, rows)


def spectral_norm(values: np.ndarray) -> float:
    """Largest singular value: exact for small matrices, else by Lanczos to a relative 1e-6.

    >>> float(spectral_norm(np.diag([3.0, -4.0])))
    4.0
    """
    if min(values.shape) <= DENSE_SIDE:
        return float(np.linalg.norm(values, 2)) if values.size else 0.0
    start = np.random.default_rng(0).standard_normal(min(values.shape))
    return float(svds(values, k=1, tol=1e-7, v0=start, return_singular_vectors=False)[0])


def _gap(source: AbstractBlockSource, a: str, b: str) -> float:
    ggn = np.linalg.norm(np.asarray(source.block(a, b, "ggn"), dtype=np.float64))
    residual = np.linalg.norm(np.asarray(source.block(a, b, "residual"), dtype=np.float64))
    if ggn == 0:
        return math.nan if residual == 0 else math.inf
    return float(residual / ggn)


def _coupling(norm: float, first: float, second: float) -> float:
    scale = math.sqrt(first) * math.sqrt(second)
    return norm / scale if scale else math.nan


def _value(row: PairRow, metric: str) -> float:
    if metric not in METRICS:
        raise ConfigError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}.")
    return float(getattr(row, metric))


def _order(value: float) -> float:
    return math.inf if math.isnan(value) else -abs(value)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value
