"""Low-rank forms ``H ~ V diag(values) V^T`` of a symmetric operator, each with an error and bounds that hold.

    exact       the eigenpairs of largest magnitude: |H - H_r|_2 = |lambda|_(r+1), |H - H_r|_F^2 = sum of the squared rest
    randomised  an orthonormal Q of the range of H times k = r + p random vectors, then the eigenpairs of Q^T H Q (Halko,
                Martinsson and Tropp 2011, algorithms 4.4 and 5.3). E |H - Q Q^T H|_F <= (1 + r / (p - 1))^1/2 times the
                best of rank r, before power iterations (theorem 10.5)
    nystrom     generalised Nystroem (Nakatsukasa 2020), the symmetric part of H W (U^T H W)^+ U^T H: one pass over H

Errors afterwards: with Ritz values, |H - H_r|_F^2 = |H|_F^2 - sum of values^2 exactly, if |H|_F is known. Else from m fresh
random vectors g: E |E g|^2 = |E|_F^2. Bounds from them fail with probability 1e-10 at most: |E|_2 <= 10 sqrt(2/pi) max |E g|
(lemma 4.1 there), and |E|_F^2 <= mean |E g|^2 m / q with q the 1e-10 quantile of chi^2 with m degrees of freedom, an E of
rank one being the worst case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import chi2

from disthess.linalg.lanczos import DENSE_SIZE, extreme_eigenpairs
from disthess.linalg.operator import AbstractSymmetricOperator

Method = Literal["randomised", "exact", "nystrom"]

ERROR_PROBES = 10
"""Random vectors of the error estimate; a bound from them fails with probability ``10 ** -ERROR_PROBES``."""


@dataclass(frozen=True, slots=True)
class LowRankResult:
    """``H ~ V diag(values) V^T``.

    Attributes:
        values: Largest magnitude first, ``[r]``.
        vectors: Orthonormal, ``[P, r]``.
        method: ``randomised``, ``exact`` or ``nystrom``.
        error: ``|H - V diag V^T|_F``, known or estimated.
        standard_error: Of ``error``; 0 where it is known.
        relative_error: ``error`` over ``|H|_F`` (estimated too unless given).
        frobenius_bound: ``|H - V diag V^T|_F`` is at most this (estimated errors: but for a probability of 1e-10).
        spectral_bound: ``|H - V diag V^T|_2`` is at most this, likewise; no eigenvalue moves by more.
        products: Products with the operator.
    """

    values: np.ndarray
    vectors: np.ndarray
    method: Method
    error: float
    standard_error: float
    relative_error: float
    frobenius_bound: float
    spectral_bound: float
    products: int

    @property
    def nbytes(self) -> int:
        """Of values and vectors."""
        return int(self.values.nbytes + self.vectors.nbytes)

    def apply(self, vectors: np.ndarray) -> np.ndarray:
        """``V diag V^T X``: ``[P, k]`` from ``[P, k]``, or the same for one vector."""
        return np.asarray(self.vectors @ ((self.vectors.T @ vectors).T * self.values).T)


def low_rank(
    operator: AbstractSymmetricOperator,
    rank: int,
    *,
    method: Method = "randomised",
    oversample: int = 10,
    power: int = 1,
    seed: int = 0,
    frobenius: float | None = None,
) -> LowRankResult:
    """A form of at most ``rank`` eigenpairs.

    Args:
        operator: Symmetric.
        rank: Wanted; at most ``P``.
        method: How; see the module's text.
        oversample: Vectors beyond the rank (``randomised``, ``nystrom``).
        power: Power iterations of ``randomised``, which sharpen a slowly decaying spectrum at one more pass each.
        seed: Of all random vectors.
        frobenius: ``|H|_F`` if it is known.

    Raises:
        ValueError: ``rank`` is not positive, ``power`` or ``oversample`` negative, or the method unknown.
    """
    if rank < 1 or oversample < 0 or power < 0:
        raise ValueError(
            f"rank must be at least 1, oversample and power not negative, got {rank}, {oversample} and {power}"
        )
    kept = min(rank, operator.size)
    if method == "exact":
        return _exact(operator, kept, seed, frobenius)
    if method == "nystrom":
        return _nystrom(operator, kept, oversample, seed, frobenius)
    if method != "randomised":
        raise ValueError(f"method must be randomised, exact or nystrom, got {method!r}")
    return _randomised(operator, kept, oversample, power, seed, frobenius)


def _exact(operator: AbstractSymmetricOperator, rank: int, seed: int, frobenius: float | None) -> LowRankResult:
    size = operator.size
    if size <= DENSE_SIZE or 2 * rank + 2 >= size:
        matrix = np.asarray(operator.matmat(np.eye(size)), dtype=np.float64)
        values, vectors = np.linalg.eigh(0.5 * (matrix + matrix.T))
        order = np.argsort(-np.abs(values), kind="stable")
        values, vectors = values[order], vectors[:, order]
        whole, rest = float(np.linalg.norm(values)), values[rank:]
        error, widest = float(np.linalg.norm(rest)), float(np.abs(rest).max(initial=0.0))
        margin = 1e-14 * size * whole
        return LowRankResult(
            values[:rank], vectors[:, :rank], "exact", error, 0.0, error / whole if whole else 0.0, error + margin,
            widest + margin, size,
        )  # fmt: skip
    found = extreme_eigenpairs(operator, rank + 1, which="both", seed=seed, vectors=True)
    order = np.argsort(-np.abs(found.values), kind="stable")
    vectors = np.asarray(found.vectors)[:, order[:rank]]
    probed = _Probed(operator, found.values[order[:rank]], vectors, seed)
    # With residuals r_i = H v_i - lambda_i v_i, E = [[0, R^T], [R, B]] in a basis that begins with V.
    off = float(np.linalg.norm(found.residuals[order[:rank]]))
    following = float(np.abs(found.values[order[rank]]) + found.residuals[order[rank]])
    bound = following + 2 * off if found.converged.all() else None
    return probed.result("exact", frobenius, found.products, bound)


def _randomised(
    operator: AbstractSymmetricOperator, rank: int, oversample: int, power: int, seed: int, frobenius: float | None
) -> LowRankResult:
    size = operator.size
    generator = np.random.default_rng(seed)
    width = min(size, rank + oversample)
    basis = np.linalg.qr(generator.standard_normal((size, width)))[0]
    for _ in range(power + 1):
        basis = np.linalg.qr(np.asarray(operator.matmat(basis), dtype=np.float64))[0]
    small = basis.T @ np.asarray(operator.matmat(basis), dtype=np.float64)
    values, vectors = _largest(small, basis, rank)
    return _Probed(operator, values, vectors, seed).result("randomised", frobenius, (power + 2) * width, None)


def _nystrom(
    operator: AbstractSymmetricOperator, rank: int, oversample: int, seed: int, frobenius: float | None
) -> LowRankResult:
    size = operator.size
    generator = np.random.default_rng(seed)
    width = min(size, rank + oversample)
    left = min(size, width + (width + 1) // 2)
    first = np.linalg.qr(generator.standard_normal((size, width)))[0]
    second = np.linalg.qr(generator.standard_normal((size, left)))[0]
    probes = _probes(size, seed)
    images = np.asarray(operator.matmat(np.concatenate([first, second, probes], axis=1)), dtype=np.float64)
    spanned, mirrored, seen = np.split(images, [width, width + left], axis=1)
    basis, corner = np.linalg.qr(np.concatenate([spanned, mirrored], axis=1))
    # Directions below rounding would be divided by: cut them off.
    cut = 10 * float(np.finfo(operator.dtype).eps)
    inner = np.linalg.pinv(second.T @ spanned, rcond=cut)
    small = corner[:, :width] @ inner @ corner[:, width:].T
    values, vectors = _largest(small, basis, rank)
    # Its values are no Ritz values, so that the norm of H does not give the error.
    return _Probed(operator, values, vectors, seed, seen).result("nystrom", None, width + left, None, frobenius)


def _largest(small: np.ndarray, basis: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    values, inner = np.linalg.eigh(0.5 * (small + small.T))
    order = np.argsort(-np.abs(values), kind="stable")[:rank]
    return values[order], basis @ inner[:, order]


def _probes(size: int, seed: int) -> np.ndarray:
    """Independent of what found the form."""
    return np.random.default_rng([seed, 1]).standard_normal((size, ERROR_PROBES))


class _Probed:
    """A form, and what fresh random vectors say of its error."""

    def __init__(
        self,
        operator: AbstractSymmetricOperator,
        values: np.ndarray,
        vectors: np.ndarray,
        seed: int,
        images: np.ndarray | None = None,
    ) -> None:
        probes = _probes(operator.size, seed)
        self._values, self._vectors = values, vectors
        self._images = np.asarray(operator.matmat(probes), dtype=np.float64) if images is None else images
        left = self._images - vectors @ (values[:, None] * (vectors.T @ probes))
        self._squares = (left**2).sum(axis=0)

    def result(
        self,
        method: Method,
        frobenius: float | None,
        products: int,
        spectral: float | None,
        whole: float | None = None,
    ) -> LowRankResult:
        """With ``frobenius`` the values must be Ritz values; ``whole`` is ``|H|_F`` for the relative error alone."""
        count = len(self._squares)
        error = float(np.sqrt(self._squares.mean()))
        spread = float(self._squares.std(ddof=1) / np.sqrt(count))
        standard = spread / (2 * error) if error > 0 else 0.0
        widest = float(error * np.sqrt(count / chi2.ppf(10.0**-ERROR_PROBES, count)))
        if frobenius is not None:
            rest = frobenius**2 - float((self._values**2).sum())
            if rest > 1e-12 * frobenius**2:
                # Known exactly, but for the rounding of a difference.
                error, standard = float(np.sqrt(rest)), 0.0
                widest = error * (1 + 1e-3)
        known = frobenius if whole is None else whole
        scale = float(np.sqrt((self._images**2).sum(axis=0).mean())) if known is None else known
        most = min(widest, float(10 * np.sqrt(2 / np.pi) * np.sqrt(self._squares.max())))
        return LowRankResult(
            self._values,
            self._vectors,
            method,
            error,
            standard,
            error / scale if scale > 0 else 0.0,
            widest,
            most if spectral is None else min(spectral, most),
            products + count,
        )
