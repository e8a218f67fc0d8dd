"""Kronecker products near a matrix ``A[(o, j), (a, b)] ~ outer[o, a] inner[j, b]``, which is never rearranged in memory.

With ``R[(o, a), (j, b)] = A[(o, j), (a, b)]`` the nearest product in Frobenius norm is the leading singular pair of R
(Van Loan and Pitsianis 1993), found from products with R and its transpose alone. Where A is symmetric R maps symmetric
matrices to symmetric ones and skew ones to skew ones, so that the pair is symmetric or skew; a skew pair can be the nearest
(``J (x) J``), and then is taken.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from scipy.sparse.linalg import LinearOperator, svds

Kind = Literal["nearest", "expectation"]
Dims: TypeAlias = tuple[int, int, int, int]

DENSE_SIDE = 256
"""Up to this many rows or columns R itself is formed and decomposed."""


class AbstractRearranged(abc.ABC):
    """A matrix ``A``, ``[o_v i_v, o_w i_w]``, known by what its rearrangement R does."""

    @property
    @abc.abstractmethod
    def dims(self) -> Dims:
        """``(o_v, o_w, i_v, i_w)``."""

    @property
    @abc.abstractmethod
    def symmetry(self) -> Literal["none", "whole", "terms"]:
        """Of A: none; symmetric as a whole; or a sum of products of symmetric matrices, for which no skew pair can win."""

    @abc.abstractmethod
    def times(self, inner: np.ndarray) -> np.ndarray:
        """``R vec(inner)``: ``[o_v, o_w]`` from ``[i_v, i_w]``."""

    @abc.abstractmethod
    def transposed(self, outer: np.ndarray) -> np.ndarray:
        """``R^T vec(outer)``: ``[i_v, i_w]`` from ``[o_v, o_w]``."""

    @abc.abstractmethod
    def residual(self, outer: np.ndarray, inner: np.ndarray) -> tuple[float, float]:
        """``|A - outer (x) inner|_F`` and ``|A|_F``, to rounding of the latter."""


@dataclass(frozen=True, slots=True)
class KroneckerResult:
    """``A ~ outer (x) inner`` with row-major ``vec``: ``A[(o, j), (a, b)] ~ outer[o, a] inner[j, b]``.

    Attributes:
        outer: Of the outputs, ``[o_v, o_w]``: the factor that K-FAC calls G.
        inner: Of the inputs, ``[i_v, i_w]``: the factor that K-FAC calls A. With a bias its row and column are the last.
        kind: ``nearest`` (both of the same Frobenius norm) or ``expectation`` (``inner`` is the mean of ``x x^T``).
        error: ``|A - outer (x) inner|_F``.
        norm: ``|A|_F``.
        names: The parameters whose block it is: of the rows, then of the columns.
        part: Of which matrix.
    """

    outer: np.ndarray
    inner: np.ndarray
    kind: Kind
    error: float
    norm: float
    names: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    part: str = "hessian"

    @property
    def relative_error(self) -> float:
        """``error / norm``; 0 where the block is zero."""
        return self.error / self.norm if self.norm else 0.0

    @property
    def shape(self) -> tuple[int, int]:
        """Of the block."""
        return self.outer.shape[0] * self.inner.shape[0], self.outer.shape[1] * self.inner.shape[1]

    @property
    def nbytes(self) -> int:
        """Of both factors."""
        return int(self.outer.nbytes + self.inner.nbytes)

    def dense(self) -> np.ndarray:
        """The product itself, ``[o_v i_v, o_w i_w]``."""
        return np.kron(self.outer, self.inner)

    def apply(self, vectors: np.ndarray) -> np.ndarray:
        """``(outer (x) inner) X``: ``[o_v i_v, k]`` from ``[o_w i_w, k]``, or the same for one vector."""
        columns = vectors.reshape(self.outer.shape[1], self.inner.shape[1], -1)
        found = np.einsum("oa,jb,abk->ojk", self.outer, self.inner, columns, optimize=True)
        return found.reshape(self.shape[0], *vectors.shape[1:])

    def solve(self, right: np.ndarray, damping: float) -> np.ndarray:
        """``(outer (x) inner + damping I)^-1 b``, exactly, through the eigenvectors of both factors.

        The damped inverse is no Kronecker product, but has the same eigenvectors ``u (x) v``.

        Args:
            right: ``b``, ``[o i]`` or ``[o i, k]``.
            damping: In the units of the block.

        Raises:
            ValueError: The block is not square and symmetric, the damped product is singular, or ``b`` has another size or is not
                finite.

        Example:
            >>> found = KroneckerResult(np.diag([1.0, 2.0]), np.eye(1), "nearest", 0.0, 1.0)
            >>> found.solve(np.array([2.0, 3.0]), 1.0).tolist()
            [1.0, 1.0]
        """
        if len(right) != self.shape[0] or not np.isfinite(right).all():
            raise ValueError(f"b must hold {self.shape[0]} finite numbers (in each column), got shape {right.shape}")
        first, second = _eigen(self.outer), _eigen(self.inner)
        if first is None or second is None or first[2] != second[2]:
            raise ValueError("the damped inverse is for symmetric blocks, one parameter against itself")
        # Of skew factors, outer (x) inner = (i outer) (x) (-i inner), both Hermitian.
        products = (-1.0 if first[2] else 1.0) * first[0][:, None] * second[0][None, :]
        shifted = products + damping
        if (np.abs(shifted) <= 1e-14 * max(float(np.abs(products).max(initial=0.0)), abs(damping), 1e-300)).any():
            raise ValueError(f"the product of factors plus {damping:g} I is singular; give another damping")
        columns = right.reshape(len(self.outer), len(self.inner), -1)
        inside = np.einsum("oa,jb,ojk->abk", first[1].conj(), second[1].conj(), columns, optimize=True)
        found = np.einsum("oa,jb,abk->ojk", first[1], second[1], inside / shifted[:, :, None], optimize=True)
        return np.ascontiguousarray(found.real).reshape(right.shape)


def nearest_product(matrix: AbstractRearranged) -> KroneckerResult:
    """``argmin |A - outer (x) inner|_F``; both factors of the same norm, the trace of ``inner`` not negative."""
    candidates = [_leading(matrix, _same)]
    if matrix.symmetry != "none":
        candidates = [_leading(matrix, _even)]
    if matrix.symmetry == "whole" and min(matrix.dims) > 1:
        candidates.append(_leading(matrix, _odd))
    value, outer, inner = max(candidates, key=lambda found: found[0])
    sign = -1.0 if _orientation(inner) < 0 else 1.0
    scale = sign * np.sqrt(value)
    return _measured(matrix, scale * outer, scale * inner, "nearest")


def expected_product(matrix: AbstractRearranged, outer: np.ndarray, inner: np.ndarray) -> KroneckerResult:
    """A product that was found by taking expectations, with its error."""
    return _measured(matrix, outer, inner, "expectation")


def _measured(matrix: AbstractRearranged, outer: np.ndarray, inner: np.ndarray, kind: Kind) -> KroneckerResult:
    error, norm = matrix.residual(outer, inner)
    return KroneckerResult(outer, inner, kind, error, norm)


def _same(values: np.ndarray) -> np.ndarray:
    return values


def _even(values: np.ndarray) -> np.ndarray:
    return 0.5 * (values + values.T)


def _odd(values: np.ndarray) -> np.ndarray:
    return 0.5 * (values - values.T)


def _leading(
    matrix: AbstractRearranged, project: Callable[[np.ndarray], np.ndarray]
) -> tuple[float, np.ndarray, np.ndarray]:
    """The leading singular value of R on the projected subspaces, and its unit vectors as matrices."""
    ov, ow, iv, iw = matrix.dims

    def forward(vector: np.ndarray) -> np.ndarray:
        return project(matrix.times(project(vector.reshape(iv, iw)))).ravel()

    def back(vector: np.ndarray) -> np.ndarray:
        return project(matrix.transposed(project(vector.reshape(ov, ow)))).ravel()

    if min(ov * ow, iv * iw) <= DENSE_SIDE:
        if iv * iw <= ov * ow:
            small = np.stack([forward(unit) for unit in np.eye(iv * iw)], axis=1)
        else:
            small = np.stack([back(unit) for unit in np.eye(ov * ow)])
        left, values, right = np.linalg.svd(small, full_matrices=False)
    else:
        operator = LinearOperator((ov * ow, iv * iw), matvec=forward, rmatvec=back, dtype=np.float64)
        start = np.random.default_rng(0).standard_normal(min(operator.shape))
        narrow = iv * iw <= ov * ow
        image, whole = (
            (forward(start), matrix.times(start.reshape(iv, iw)))
            if narrow
            else (back(start), matrix.transposed(start.reshape(ov, ow)))
        )
        if np.linalg.norm(image) <= 1e-12 * np.linalg.norm(whole):
            return 0.0, np.zeros((ov, ow)), np.zeros((iv, iw))  # nothing of A in this subspace, which ARPACK refuses
        left, values, right = svds(operator, k=1, v0=start, maxiter=100 * min(operator.shape))
    return float(values[0]), project(left[:, 0].reshape(ov, ow)), project(right[0].reshape(iv, iw))


def _orientation(inner: np.ndarray) -> float:
    """What decides the sign of both factors: the trace, or, where there is none, the largest entry."""
    trace = float(np.trace(inner)) if inner.shape[0] == inner.shape[1] else 0.0
    if abs(trace) > 1e-8 * float(np.abs(inner).max(initial=0.0)):
        return trace
    return float(inner.ravel()[np.argmax(np.abs(inner))]) if inner.size else 1.0


def _eigen(factor: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool] | None:
    """Eigenpairs of a symmetric factor, or of i times a skew one, and whether it is skew; None if it is neither."""
    if factor.shape[0] != factor.shape[1]:
        return None
    scale = float(np.abs(factor).max(initial=0.0))
    if np.abs(factor - factor.T).max(initial=0.0) <= 1e-10 * scale:
        values, vectors = np.linalg.eigh(0.5 * (factor + factor.T))
        return values, vectors, False
    if np.abs(factor + factor.T).max(initial=0.0) > 1e-10 * scale:
        return None
    values, vectors = np.linalg.eigh(1j * factor)
    return values, vectors, True
