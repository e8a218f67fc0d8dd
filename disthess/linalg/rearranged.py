"""Blocks of linear layers by what their rearrangements do: from the block itself, or from the sums they are, block unformed.

For layers ``z = x W^T`` with independent samples n, rows r within a sample, and v no earlier than w,

    diagonal        A = sum_n sum_rs H^n[r, s] (x) x_r x_s^T + identity (x) decay
    off-diagonal    A = sum_n sum_rs (H^n[r, s] (x) x_v,r + delta_v,r (x) X^n[r, s]) x_w,s^T         X = d x_v / d z_w
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, final

import numpy as np
from typing_extensions import override

from disthess.linalg.kronecker import AbstractRearranged, Dims


@final
class BlockRearranged(AbstractRearranged):
    """A block in memory.

    Args:
        block: ``[o_v, i_v, o_w, i_w]``, a view of ``[o_v i_v, o_w i_w]``.
        symmetric: Whether that is symmetric.
    """

    def __init__(self, block: np.ndarray, symmetric: bool) -> None:
        self._block = block
        self._symmetric = symmetric

    @property
    @override
    def dims(self) -> Dims:
        ov, iv, ow, iw = self._block.shape
        return ov, ow, iv, iw

    @property
    @override
    def symmetry(self) -> Literal["none", "whole", "terms"]:
        return "whole" if self._symmetric else "none"

    @override
    def times(self, inner: np.ndarray) -> np.ndarray:
        return np.tensordot(self._block, inner, axes=([1, 3], [0, 1]))

    @override
    def transposed(self, outer: np.ndarray) -> np.ndarray:
        return np.tensordot(self._block, outer, axes=([0, 2], [0, 1]))

    @override
    def residual(self, outer: np.ndarray, inner: np.ndarray) -> tuple[float, float]:
        return _norms((rows.astype(np.float64) for rows in self._block), outer, inner)


@final
class SumRearranged(AbstractRearranged):
    """A layer's own block, from per-sample curvature at its output and its input rows.

    Args:
        curvature: ``H^n``, ``[n, R, o, R, o]``, the objective's 1/N in it.
        rows: ``x``, ``[n, R, i]``.
        decay: What weight decay adds to the diagonal, by input, ``[i]``.
    """

    def __init__(self, curvature: np.ndarray, rows: np.ndarray, decay: np.ndarray) -> None:
        count, per_sample, outputs = curvature.shape[:3]
        self._outputs = outputs
        self._rows = rows
        self._decay = decay
        self._curvature = curvature
        self._pairs = np.ascontiguousarray(curvature.transpose(0, 1, 3, 2, 4)).reshape(-1, outputs * outputs)
        self._single = per_sample == 1
        self._shape = (count, per_sample, per_sample)

    @property
    @override
    def dims(self) -> Dims:
        width = self._rows.shape[2]
        return self._outputs, self._outputs, width, width

    @property
    @override
    def symmetry(self) -> Literal["none", "whole", "terms"]:
        return "terms" if self._single else "whole"

    def expectation(self) -> tuple[np.ndarray, np.ndarray]:
        """``sum_n,r H^n[r, r]`` and the mean of ``x_r x_r^T``; decay is left out."""
        outer = np.einsum("nraRb,rR->ab", self._curvature, np.eye(self._shape[1]), optimize=True)
        flat = self._rows.reshape(-1, self._rows.shape[2])
        return outer, flat.T @ flat / len(flat)

    @override
    def times(self, inner: np.ndarray) -> np.ndarray:
        weights = np.matmul(self._rows @ inner, self._rows.transpose(0, 2, 1))
        found = (weights.ravel() @ self._pairs).reshape(self._outputs, self._outputs)
        return found + float(self._decay @ np.diag(inner)) * np.eye(self._outputs)

    @override
    def transposed(self, outer: np.ndarray) -> np.ndarray:
        weights = (self._pairs @ outer.ravel()).reshape(self._shape)
        moved = np.matmul(weights, self._rows)
        found = np.tensordot(self._rows, moved, axes=([0, 1], [0, 1]))
        return found + float(np.trace(outer)) * np.diag(self._decay)

    @override
    def residual(self, outer: np.ndarray, inner: np.ndarray) -> tuple[float, float]:
        terms, (outputs, _, width, _) = len(self._pairs), self.dims
        by_terms = terms**2 * (outputs**2 + width**2)
        by_units = len(self._rows) * self._shape[1] * (outputs * width) ** 2
        if by_terms < by_units:
            return self._residual_by_terms(outer, inner)
        return _norms((self._unit(unit) for unit in range(outputs)), outer, inner)

    def _unit(self, unit: int) -> np.ndarray:
        """The rows of the block that belong to one output: ``[i, o, i]``."""
        moved = np.einsum("nrsa,nsb->nrab", self._curvature[:, :, unit], self._rows, optimize=True)
        found = np.tensordot(self._rows, moved, axes=([0, 1], [0, 1]))
        found[:, unit] += np.diag(self._decay)
        return found

    def _residual_by_terms(self, outer: np.ndarray, inner: np.ndarray) -> tuple[float, float]:
        """``|U^T V|_F^2 = <U U^T, V V^T>`` over terms, with what is along the factors taken out of both sides first."""
        left = np.concatenate([self._pairs, np.eye(self._outputs).reshape(1, -1)])
        right = np.einsum("nrj,nsb->nrsjb", self._rows, self._rows).reshape(len(self._pairs), -1)
        right = np.concatenate([right, np.diag(self._decay).reshape(1, -1)])
        first, second = _unit_vector(outer), _unit_vector(inner)
        along_left, along_right = left @ first, right @ second
        left, right = left - np.outer(along_left, first), right - np.outer(along_right, second)
        size = float(np.linalg.norm(outer) * np.linalg.norm(inner))
        both = float(along_left @ along_right)
        rest = float(np.linalg.norm(along_left @ right) ** 2 + np.linalg.norm(along_right @ left) ** 2)
        for start in range(0, len(left), 512):
            chunk = slice(start, start + 512)
            rest += float(np.vdot(left[chunk] @ left.T, right[chunk] @ right.T))
        rest = max(rest, 0.0)
        return math.sqrt(rest + (both - size) ** 2), math.sqrt(rest + both**2)


@final
class CrossRearranged(AbstractRearranged):
    """A block of a later layer v by an earlier one w.

    Args:
        curvature: ``H^n`` of the outputs, ``[n, R_v, o_v, R_w, o_w]``.
        deltas: ``dL/dz_v`` where the layer's own bilinearity counts (not in the ggn of a model), ``[n, R_v, o_v]``; else zeros.
        moved: ``X^n``, ``[n, R_v, i_v, R_w, o_w]``.
        later: ``x_v``, ``[n, R_v, i_v]``.
        earlier: ``x_w``, ``[n, R_w, i_w]``.
    """

    def __init__(
        self, curvature: np.ndarray, deltas: np.ndarray, moved: np.ndarray, later: np.ndarray, earlier: np.ndarray
    ) -> None:
        self._curvature = curvature
        self._deltas = deltas
        self._moved = moved
        self._later = later
        self._earlier = earlier

    @property
    @override
    def dims(self) -> Dims:
        return self._curvature.shape[2], self._curvature.shape[4], self._later.shape[2], self._earlier.shape[2]

    @property
    @override
    def symmetry(self) -> Literal["none", "whole", "terms"]:
        return "none"

    @override
    def times(self, inner: np.ndarray) -> np.ndarray:
        seen = self._earlier @ inner.T
        weights = np.matmul(self._later, seen.transpose(0, 2, 1))
        moved = np.einsum("nrjsa,nsj->nra", self._moved, seen, optimize=True)
        found = np.einsum("nrosa,nrs->oa", self._curvature, weights, optimize=True)
        return found + np.einsum("nro,nra->oa", self._deltas, moved, optimize=True)

    @override
    def transposed(self, outer: np.ndarray) -> np.ndarray:
        weights = np.einsum("nrosa,oa->nrs", self._curvature, outer, optimize=True)
        rows = np.matmul(weights.transpose(0, 2, 1), self._later)
        rows += np.einsum("nrjsa,nra->nsj", self._moved, self._deltas @ outer, optimize=True)
        return np.tensordot(rows, self._earlier, axes=([0, 1], [0, 1]))

    @override
    def residual(self, outer: np.ndarray, inner: np.ndarray) -> tuple[float, float]:
        return _norms((self._unit(unit) for unit in range(len(outer))), outer, inner)

    def _unit(self, unit: int) -> np.ndarray:
        """The rows of the block that belong to one output: ``[i_v, o_w, i_w]``."""
        rows = np.einsum("nrsa,nrj->nsja", self._curvature[:, :, unit], self._later, optimize=True)
        rows += np.einsum("nr,nrjsa->nsja", self._deltas[:, :, unit], self._moved, optimize=True)
        return np.tensordot(rows, self._earlier, axes=([0, 1], [0, 1]))


@final
class FlippedRearranged(AbstractRearranged):
    """The transpose of another."""

    def __init__(self, inner: AbstractRearranged) -> None:
        self._inner = inner

    @property
    @override
    def dims(self) -> Dims:
        ov, ow, iv, iw = self._inner.dims
        return ow, ov, iw, iv

    @property
    @override
    def symmetry(self) -> Literal["none", "whole", "terms"]:
        return self._inner.symmetry

    @override
    def times(self, inner: np.ndarray) -> np.ndarray:
        return self._inner.times(inner.T).T

    @override
    def transposed(self, outer: np.ndarray) -> np.ndarray:
        return self._inner.transposed(outer.T).T

    @override
    def residual(self, outer: np.ndarray, inner: np.ndarray) -> tuple[float, float]:
        return self._inner.residual(outer.T, inner.T)


def _norms(units: Iterator[np.ndarray], outer: np.ndarray, inner: np.ndarray) -> tuple[float, float]:
    """Of what a product leaves, and of the whole, from the rows ``[i_v, o_w, i_w]`` that belong to each output."""
    error = norm = 0.0
    for rows, factor in zip(units, outer, strict=True):
        norm += float(np.vdot(rows, rows))
        left = rows - factor[None, :, None] * inner[:, None, :]
        error += float(np.vdot(left, left))
    return math.sqrt(error), math.sqrt(norm)


def _unit_vector(factor: np.ndarray) -> np.ndarray:
    norm = float(np.linalg.norm(factor))
    return factor.ravel() / norm if norm else np.zeros(factor.size)
