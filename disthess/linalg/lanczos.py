"""Eigenpairs at the ends of the spectrum, with the residual of each.

Block Lanczos with full reorthogonalisation and thick restarts, a dense solve for small matrices. Products take blocks of
vectors, because a store is read once per product whatever the block's width. ARPACK is not used: its tolerance is relative to each
eigenvalue, so that a cluster near zero beside a large one never ends.

1. Start from a random orthonormal block; keep a basis V and HV.
2. Rayleigh-Ritz on V gives pairs whose residuals ``|H v - lambda v|`` are known exactly from HV.
3. Stop when every wanted residual is at most ``tolerance`` times the largest magnitude seen; else grow V by the orthonormalised
   residuals of the worst wanted pairs (after a block start that is the next Krylov block).
4. When V is full, keep the Ritz vectors nearest the wanted ends and go on.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
from typing_extensions import override

from disthess.linalg.checkpoint import Checkpoint, IterationState, operator_fingerprint
from disthess.linalg.operator import AbstractSymmetricOperator

Which = Literal["both", "largest", "smallest"]

BLOCK = 8
"""Vectors multiplied at once; see `block_width`."""

LARGE_SIZE = 1 << 20
"""Beyond, vectors are what memory is short of, and operators multiply them one by one."""

MAX_BASIS = 400
"""Vectors kept at most, unless more than 92 eigenpairs are wanted; ``16 P`` bytes each. See `basis_bytes`."""

ROTATED = 4096
"""Entries of all vectors that a restart rotates at a time."""

MAX_PRODUCTS = 20_000
"""Products after which what has been found is returned, with residuals that say how far it got."""

DENSE_SIZE = 600
"""Up to this size all eigenvalues are found at once, from the dense matrix."""


@dataclass(frozen=True, slots=True)
class EigenResult:
    """Eigenpairs.

    Attributes:
        values: Ascending, ``[k]``.
        residuals: ``|H v - lambda v|_2`` of each unit vector, ``[k]``.
        vectors: ``[P, k]``, or None if not asked for.
        products: Products with the operator that were needed.
        converged: Whether each residual is within ``tolerance`` times the largest magnitude in the spectrum, ``[k]``.
        tolerance: As used.

    An eigenvalue lies within ``residuals[i]`` of ``values[i]``: see ``intervals``. Where products are rounded to float32, that
    holds up to their rounding.
    """

    values: np.ndarray
    residuals: np.ndarray
    vectors: np.ndarray | None
    products: int
    converged: np.ndarray
    tolerance: float

    @property
    def intervals(self) -> np.ndarray:
        """``[k, 2]``: each holds an eigenvalue, whether it converged or not; ``value - residual`` to ``value + residual``."""
        return np.stack([self.values - self.residuals, self.values + self.residuals], axis=1)


@final
class _Counting(AbstractSymmetricOperator):
    """Counts products, in float64."""

    def __init__(self, inner: AbstractSymmetricOperator, notify: Callable[[int], None] | None) -> None:
        self.inner = inner
        self.count = 0
        self._notify = notify

    @property
    @override
    def size(self) -> int:
        return self.inner.size

    @property
    @override
    def dtype(self) -> np.dtype:
        return np.dtype(np.float64)

    @override
    def matmat(self, block: np.ndarray) -> np.ndarray:
        found = np.asarray(self.inner.matmat(block), dtype=np.float64)
        self.count += block.shape[1]
        if self._notify is not None:
            self._notify(self.count)
        return found


def extreme_eigenpairs(
    operator: AbstractSymmetricOperator,
    k: int,
    *,
    which: Which = "both",
    seed: int = 0,
    tolerance: float | None = None,
    vectors: bool = False,
    memory_bytes: int | None = None,
    max_products: int | None = None,
    steps: int | None = None,
    watch: Callable[[int, float], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    notify: Callable[[int], None] | None = None,
) -> EigenResult:
    """The ``k`` largest, ``k`` smallest (most negative), or ``k`` of each.

    Args:
        operator: Symmetric.
        k: How many at each end asked for; fewer where the matrix is smaller.
        which: ``both``, ``largest`` or ``smallest``.
        seed: Of the start vector.
        tolerance: Residual over the largest magnitude that counts as converged; default 1e-9 in float64, 1e-6 in float32.
        vectors: Whether to return them.
        memory_bytes: What the basis and its image may take; default and least as `basis_bytes` says.
        max_products: After which what has been found is returned; default `MAX_PRODUCTS`.
        steps: Products to take whatever the residuals are, in whole blocks of `block_width`, in place of ``max_products``; one more
            for each eigenpair measures its residual. Matrices of at most `DENSE_SIZE` rows take none of them.
        watch: Called with the products so far and the largest wanted residual over the largest magnitude, after each block.
        checkpoint: A file for the state of the iteration, saved between steps at most every 30 s, and gone on from where it is
            there: the result is then the same to the last bit. It stays. Matrices of at most `DENSE_SIZE` rows need none.
        notify: Called with the products done so far.

    Returns:
        Values in ascending order, each with its residual.

    Raises:
        ValueError: ``k`` is not positive, ``which`` is unknown, or the checkpoint is another question's.

    Example:
        >>> from disthess.linalg.operator import DenseOperator
        >>> extreme_eigenpairs(DenseOperator(np.diag([3.0, -1.0, 2.0])), 1).values.tolist()
        [-1.0, 3.0]
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if which not in ("both", "largest", "smallest"):
        raise ValueError(f"which must be both, largest or smallest, got {which!r}")
    counted = _Counting(operator, notify)
    allowed = (1e-9 if operator.dtype == np.float64 else 1e-6) if tolerance is None else tolerance
    ends = 2 if which == "both" else 1
    if operator.size <= max(DENSE_SIZE, 2 * ends * k + 1):
        basis, scale = _dense(counted, k, which)
    else:
        file = None
        if checkpoint is not None:
            question = {"size": operator.size, "dtype": str(operator.dtype), "seed": seed, "k": k, "which": which}
            question |= {"tolerance": allowed, "operator": operator_fingerprint(counted)}
            file = Checkpoint(checkpoint, question)
        limit = basis_columns(operator.size, k, which, memory_bytes)
        most = MAX_PRODUCTS if max_products is None else max_products
        stop = _Stop(allowed, most if steps is None else steps, steps is not None, watch)
        basis, scale = _iterative(counted, k, which, stop, _start(counted, k, seed, limit, file), file)
    image = counted.matmat(basis)
    values = np.einsum("pk,pk->k", basis, image)
    order = np.argsort(values, kind="stable")
    values, basis, image = values[order], basis[:, order], image[:, order]
    residuals = np.linalg.norm(image - basis * values, axis=0)
    return EigenResult(
        values, residuals, basis if vectors else None, counted.count, residuals <= 2 * allowed * scale, allowed
    )


def _dense(operator: _Counting, k: int, which: Which) -> tuple[np.ndarray, float]:
    matrix = operator.matmat(np.eye(operator.size))
    values, basis = np.linalg.eigh(0.5 * (matrix + matrix.T))
    size = operator.size
    low = list(range(min(k, size))) if which != "largest" else []
    high = list(range(max(size - k, 0), size)) if which != "smallest" else []
    return basis[:, sorted({*low, *high})], max(float(np.abs(values).max()), np.finfo(np.float64).tiny)


def block_width(size: int, k: int) -> int:
    """Vectors multiplied at once: `BLOCK`, but of more than `LARGE_SIZE` entries no more than ``k``.

    Fewer take less memory and fewer products. A multiple eigenvalue is found at least so many times.

    >>> block_width(1000, 1), block_width(10_000_000, 1), block_width(10_000_000, 20)
    (8, 1, 8)
    """
    return BLOCK if size <= LARGE_SIZE else min(BLOCK, k)


def basis_columns(size: int, k: int, which: Which = "both", memory_bytes: int | None = None) -> int:
    """How many vectors `extreme_eigenpairs` keeps at most.

    Args:
        size: ``P``.
        k: As given there.
        which: As given there.
        memory_bytes: As given there.

    Returns:
        ``min(MAX_BASIS, memory_bytes / 16 P)``, but no fewer than ``4 (wanted + block)``, without which restarts lose what was
        found, and no more than ``P``.

    >>> basis_columns(1_000_000, 10), basis_columns(1_000_000, 10, memory_bytes=3_200_000_000)
    (400, 200)
    """
    wanted = 2 * k if which == "both" else k
    allowed = MAX_BASIS if memory_bytes is None else min(MAX_BASIS, memory_bytes // (16 * size))
    return min(size, max(allowed, 4 * (wanted + block_width(size, k))))


def basis_bytes(size: int, k: int, which: Which = "both", memory_bytes: int | None = None) -> int:
    """The memory bound of `extreme_eigenpairs`: ``columns * P * 8`` bytes for the basis V and as much for HV.

    Besides there are a few blocks of ``wanted + 4 block`` vectors, and what the operator takes.

    >>> basis_bytes(1_000_000, 10)
    6400000000
    """
    return 2 * basis_columns(size, k, which, memory_bytes) * size * 8


@final
class _Space:
    """The basis V, its image HV and ``V^T H V``: memory asked for once, vectors as rows, pages taken as they are written."""

    def __init__(self, size: int, limit: int) -> None:
        self.limit = limit
        self.count = 0
        self._vectors = np.empty((limit, size))
        self._images = np.empty((limit, size))
        self._small = np.zeros((limit, limit))

    @property
    def basis(self) -> np.ndarray:
        """``V``, ``[P, count]``."""
        return self._vectors[: self.count].T

    @property
    def image(self) -> np.ndarray:
        """``HV``, ``[P, count]``."""
        return self._images[: self.count].T

    @property
    def small(self) -> np.ndarray:
        """``V^T H V``, symmetric, ``[count, count]``."""
        values = self._small[: self.count, : self.count]
        return 0.5 * (values + values.T)

    def grow(self, fresh: np.ndarray, moved: np.ndarray) -> None:
        """Add orthonormal columns and their images."""
        old, new = self.count, self.count + fresh.shape[1]
        border = self.basis.T @ moved
        self._small[:old, old:new], self._small[old:new, :old] = border, border.T
        self._small[old:new, old:new] = fresh.T @ moved
        self._vectors[old:new], self._images[old:new] = fresh.T, moved.T
        self.count = new

    def rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Basis and image as rows, and the small matrix: what `restore` takes."""
        return self._vectors[: self.count], self._images[: self.count], self._small[: self.count, : self.count]

    def restore(self, vectors: np.ndarray, images: np.ndarray, small: np.ndarray) -> None:
        """Go on from what `rows` gave."""
        self.count = len(vectors)
        self._vectors[: self.count], self._images[: self.count] = vectors, images
        self._small[: self.count, : self.count] = small

    def keep(self, inner: np.ndarray, values: np.ndarray) -> None:
        """Go over to the Ritz vectors ``V inner``, in place, some entries of all vectors at a time."""
        kept = inner.shape[1]
        for rows in (self._vectors, self._images):
            for start in range(0, rows.shape[1], ROTATED):
                piece = slice(start, start + ROTATED)
                rows[:kept, piece] = inner.T @ rows[: self.count, piece]
        self.count = kept
        self._small[:kept, :kept] = np.diag(values)


@dataclass(frozen=True, slots=True)
class _Stop:
    tolerance: float
    products: int
    exactly: bool
    watch: Callable[[int, float], None] | None


@dataclass(slots=True)
class _Standing:
    """Where the iteration is between two steps."""

    space: _Space
    fresh: np.ndarray
    generator: np.random.Generator
    block: int

    def state(self, products: int) -> IterationState:
        """For a file."""
        basis, image, small = self.space.rows()
        return IterationState(
            basis, image, small, self.fresh, dict(self.generator.bit_generator.state), products, self.space.limit
        )


def _start(operator: _Counting, k: int, seed: int, limit: int, file: Checkpoint | None) -> _Standing:
    """From a random block, or where a file left off: with its limit, so that nothing depends on the memory there is now."""
    generator = np.random.default_rng(seed)
    block = block_width(operator.size, k)
    saved = None if file is None else file.load()
    if saved is None:
        fresh = np.ascontiguousarray(np.linalg.qr(generator.standard_normal((operator.size, block)))[0])
        return _Standing(_Space(operator.size, limit), fresh, generator, block)
    generator.bit_generator.state = saved.generator
    operator.count = saved.products
    space = _Space(operator.size, saved.limit)
    space.restore(saved.vectors, saved.images, saved.small)
    return _Standing(space, saved.fresh, generator, block)


def _iterative(
    operator: _Counting, k: int, which: Which, stop: _Stop, at: _Standing, file: Checkpoint | None
) -> tuple[np.ndarray, float]:
    wanted = 2 * k if which == "both" else k
    space = at.space
    while True:
        space.grow(at.fresh, operator.matmat(at.fresh))
        values, inner = np.linalg.eigh(space.small)
        ends = _ends(len(values), k, which)
        found = space.basis @ inner[:, ends]
        residuals = space.image @ inner[:, ends] - found * values[ends]
        sizes = np.linalg.norm(residuals, axis=0)
        scale = max(float(np.abs(values).max()), np.finfo(np.float64).tiny)
        enough = len(ends) == wanted and bool((sizes <= stop.tolerance * scale).all())
        if stop.watch is not None:
            stop.watch(operator.count, float(sizes.max()) / scale)
        if (enough and not stop.exactly) or operator.count >= stop.products:
            return found, scale
        if space.count + at.block > space.limit:
            kept = _ends(len(values), wanted + at.block if which != "both" else k + at.block, which)
            space.keep(inner[:, kept], values[kept])
        worst = residuals[:, np.argsort(-sizes, kind="stable")[: at.block]]
        # One layout, as it will be when it comes from a file: products of matrices round by it.
        at.fresh = np.ascontiguousarray(_orthonormal(worst, space.basis, at.block, at.generator))
        if at.fresh.shape[1] == 0:
            return found, scale
        if file is not None:
            file.save_if_due(at.state(operator.count))


def _ends(size: int, k: int, which: Which) -> np.ndarray:
    """Positions of the wanted ones among ascending values."""
    low = range(min(k, size)) if which != "largest" else range(0)
    high = range(max(size - k, 0), size) if which != "smallest" else range(0)
    return np.array(sorted({*low, *high}))


def _orthonormal(block: np.ndarray, basis: np.ndarray, most: int, generator: np.random.Generator) -> np.ndarray:
    """The block made orthonormal to the basis, twice; random directions in place of what vanishes, up to a full block."""
    room = basis.shape[0] - basis.shape[1]
    width = min(most, room)
    norms = np.linalg.norm(block, axis=0)
    columns = block[:, norms > 0] / norms[norms > 0]
    if columns.shape[1] < width:
        columns = np.concatenate(
            [columns, generator.standard_normal((basis.shape[0], width - columns.shape[1]))], axis=1
        )
    for _ in range(2):
        columns = columns - basis @ (basis.T @ columns)
        columns = np.linalg.qr(columns[:, :width])[0]
    return columns
