"""Every block of a store by itself, truncated: diagonal blocks by eigenvalues, others by singular values.

    |H - H'|_F^2 = sum over diagonal blocks of the squared rest  +  2 sum over pairs of the squared rest

and ``|H - H'|_2`` is at most the spectral norm of the matrix of the errors of blocks. Truncation off the diagonal can make a
positive definite matrix indefinite, by no more than that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.sparse.linalg import LinearOperator

from disthess.linalg.lowrank import low_rank
from disthess.linalg.operator import DenseOperator
from disthess.reduce.arrays import PanelReader, block

FULL_SIDE = 1500
"""Blocks whose smaller side is at most this are decomposed whole, others by a randomised range finder of the rank wanted."""


@dataclass(frozen=True, slots=True)
class TruncatedBlock:
    """``H_ab ~ left diag(values) right^T``; a diagonal block has the same vectors on both sides.

    Attributes:
        left: Orthonormal, ``[p_a, r]``.
        values: Singular values; of a diagonal block eigenvalues, largest magnitude first, ``[r]``.
        right: Orthonormal, ``[p_b, r]``.
        error: ``|H_ab - left diag right^T|_F``.
        spectral: ``|H_ab - left diag right^T|_2`` is at most this.
    """

    left: np.ndarray
    values: np.ndarray
    right: np.ndarray
    error: float
    spectral: float


@dataclass(frozen=True, slots=True)
class TruncatedBlocks:
    """All blocks, each pair once.

    Attributes:
        sizes: Entries of each parameter, in user order.
        blocks: By (earlier, later) name in user order.
        norm: ``|H|_F``.
    """

    sizes: Mapping[str, int]
    blocks: Mapping[tuple[str, str], TruncatedBlock]
    norm: float

    @property
    def error(self) -> float:
        """``|H - H'|_F``."""
        return math.sqrt(sum(b.error**2 * (1 if pair[0] == pair[1] else 2) for pair, b in self.blocks.items()))

    @property
    def relative_error(self) -> float:
        """``error`` over ``|H|_F``."""
        return self.error / self.norm if self.norm else 0.0

    @property
    def spectral_bound(self) -> float:
        """``|H - H'|_2`` is at most this."""
        place = {name: index for index, name in enumerate(self.sizes)}
        errors = np.zeros((len(place), len(place)))
        for (a, b), found in self.blocks.items():
            errors[place[a], place[b]] = errors[place[b], place[a]] = found.spectral
        return float(np.linalg.norm(errors, 2)) if errors.size else 0.0

    @property
    def nbytes(self) -> int:
        """Of everything kept; the vectors of a diagonal block count once."""
        return sum(
            b.left.nbytes + b.values.nbytes + (0 if pair[0] == pair[1] else b.right.nbytes)
            for pair, b in self.blocks.items()
        )

    def ranks(self) -> dict[tuple[str, str], int]:
        """Kept ranks."""
        return {pair: len(found.values) for pair, found in self.blocks.items()}

    def apply(self, vectors: np.ndarray) -> np.ndarray:
        """``H' X``: ``[P, k]`` from ``[P, k]``, or the same for one vector."""
        starts = dict(zip(self.sizes, np.cumsum([0, *self.sizes.values()]).tolist(), strict=False))
        total = np.zeros(vectors.shape)
        for (a, b), found in self.blocks.items():
            rows = slice(starts[a], starts[a] + self.sizes[a])
            columns = slice(starts[b], starts[b] + self.sizes[b])
            total[rows] += found.left @ ((found.right.T @ vectors[columns]).T * found.values).T
            if a != b:
                total[columns] += found.right @ ((found.left.T @ vectors[rows]).T * found.values).T
        return total

    def operator(self) -> LinearOperator:
        """The same for SciPy's solvers."""
        size = sum(self.sizes.values())
        return LinearOperator((size, size), matvec=self.apply, rmatvec=self.apply, matmat=self.apply, dtype=np.float64)


def truncate_blocks(
    reader: PanelReader,
    wanted: Callable[[str, str], int],
    tolerance: float,
    norm: float,
    progress: Callable[[int, int], None] | None = None,
) -> TruncatedBlocks:
    """Truncate every block.

    Args:
        reader: The store and part.
        wanted: Most rank of a pair.
        tolerance: Singular values at most this (absolute) are dropped too.
        norm: ``|H|_F``.
        progress: Called with (blocks done, blocks in all).
    """
    parameters = list(reader.parameters.values())
    pairs = [(a, b) for i, a in enumerate(parameters) for b in parameters[i:]]
    found = {}
    for number, (a, b) in enumerate(pairs):
        values = block(reader, a, b).astype(np.float64)
        truncate = _symmetric if a.name == b.name else _oblong
        found[a.name, b.name] = truncate(values, wanted(a.name, b.name), tolerance)
        if progress is not None:
            progress(number + 1, len(pairs))
    return TruncatedBlocks({p.name: p.numel for p in parameters}, found, norm)


def _symmetric(values: np.ndarray, rank: int, tolerance: float) -> TruncatedBlock:
    if len(values) > FULL_SIDE and rank + 10 < len(values) // 2:
        found = low_rank(DenseOperator(values), rank, power=2, frobenius=float(np.linalg.norm(values)))
        kept = int((np.abs(found.values) > tolerance).sum())
        vectors = found.vectors[:, :kept]
        left = float(np.linalg.norm(values - (vectors * found.values[:kept]) @ vectors.T))
        return TruncatedBlock(vectors, found.values[:kept], vectors, left, left)
    eigen, vectors = np.linalg.eigh(0.5 * (values + values.T))
    order = np.argsort(-np.abs(eigen), kind="stable")
    eigen, vectors = eigen[order], vectors[:, order]
    kept = min(rank, int((np.abs(eigen) > tolerance).sum()))
    rest = eigen[kept:]
    return TruncatedBlock(
        vectors[:, :kept], eigen[:kept], vectors[:, :kept], float(np.linalg.norm(rest)), float(np.abs(rest).max(initial=0.0))
    )  # fmt: skip


def _oblong(values: np.ndarray, rank: int, tolerance: float) -> TruncatedBlock:
    smaller = min(values.shape)
    if smaller > FULL_SIDE and rank + 10 < smaller // 2:
        return _sketched(values, rank, tolerance)
    left, singular, right = np.linalg.svd(values, full_matrices=False)
    kept = min(rank, int((singular > tolerance).sum()))
    rest = singular[kept:]
    return TruncatedBlock(
        left[:, :kept], singular[:kept], right[:kept].T, float(np.linalg.norm(rest)), float(rest.max(initial=0.0))
    )


def _sketched(values: np.ndarray, rank: int, tolerance: float) -> TruncatedBlock:
    """``|A - A_r|_F^2 = |A|_F^2 - sum of the kept values squared``, exactly, for the SVD of ``Q^T A``."""
    basis = values @ np.random.default_rng(0).standard_normal((values.shape[1], rank + 10))
    for _ in range(2):
        basis = values @ np.linalg.qr(values.T @ np.linalg.qr(basis)[0])[0]
    basis = np.linalg.qr(basis)[0]
    inner, singular, right = np.linalg.svd(basis.T @ values, full_matrices=False)
    kept = min(rank, int((singular > tolerance).sum()))
    left = values - (basis @ inner[:, :kept] * singular[:kept]) @ right[:kept]
    error = float(np.linalg.norm(left))
    return TruncatedBlock(basis @ inner[:, :kept], singular[:kept], right[:kept].T, error, error)
