"""Exact expectations over one draw: all values of a finite distribution, or a Gauss rule for a reparametrised one.

Gauss-Hermite for normal, Gauss-Legendre for uniform, Gauss-Laguerre for exponential draws: exact for polynomials of degree
``2 n - 1`` in the noise. A draw with several entries takes the product of one rule for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch import distributions as td
from torch.distributions import Distribution

from disthess.errors import ProblemError


@dataclass(frozen=True, slots=True)
class Support:
    """Points of a draw with their weights.

    Attributes:
        size: How many.
        discrete: Whether weights are probabilities that depend on the parameters, rather than a fixed rule.
        point: From a number to the value and the logarithm of its weight, both differentiable.
    """

    size: int
    discrete: bool
    point: Callable[[int], tuple[Tensor, Tensor]]


def support_of(name: str, distribution: Distribution, points: int) -> Support:
    """The support of a draw.

    Raises:
        ProblemError: The distribution is neither finite nor one with a rule.
    """
    inner = distribution
    while isinstance(inner, td.Independent):
        inner = inner.base_dist
    if inner.has_enumerate_support:
        return _finite(distribution, inner)
    rule = _RULES.get(type(inner))
    if rule is None:
        known = ", ".join(sorted(kind.__name__ for kind in _RULES))
        raise ProblemError(
            f"the draw {name!r} from {type(inner).__name__} has no exact expectation here: its support is not finite and there are "
            f"Gauss rules for {known} only. Use how='monte_carlo'."
        )
    noise, log_weights = rule[0](points)
    shape = inner.batch_shape
    entries = math.prod(shape)
    transform = rule[1](inner)

    def point(number: int) -> tuple[Tensor, Tensor]:
        digits = _digits(number, points, entries)
        value: Tensor = transform(torch.tensor(noise[digits]).reshape(tuple(shape)))
        return value, torch.tensor(float(log_weights[digits].sum()), dtype=torch.float64)

    return Support(points**entries, False, point)


def _finite(distribution: Distribution, inner: Distribution) -> Support:
    values = inner.enumerate_support(expand=False)
    flat = values.reshape((values.shape[0], *inner.event_shape))
    entries = math.prod(inner.batch_shape)

    def point(number: int) -> tuple[Tensor, Tensor]:
        digits = _digits(number, len(flat), entries)
        value = flat[torch.as_tensor(digits)].reshape((*inner.batch_shape, *inner.event_shape))
        return value, distribution.log_prob(value).sum()

    return Support(len(flat) ** entries, True, point)


def _digits(number: int, base: int, count: int) -> np.ndarray:
    digits = np.zeros(count, dtype=np.int64)
    for place in range(count):
        number, digits[place] = divmod(number, base)
    return digits


def _hermite(points: int) -> tuple[np.ndarray, np.ndarray]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    return nodes, np.log(weights / weights.sum())


def _legendre(points: int) -> tuple[np.ndarray, np.ndarray]:
    nodes, weights = np.polynomial.legendre.leggauss(points)
    return 0.5 * (nodes + 1), np.log(0.5 * weights)


def _laguerre(points: int) -> tuple[np.ndarray, np.ndarray]:
    nodes, weights = np.polynomial.laguerre.laggauss(points)
    return nodes, np.log(weights)


_RULES: dict[type, tuple[Callable[[int], tuple[np.ndarray, np.ndarray]], Callable[..., Callable[[Tensor], Tensor]]]] = {
    td.Normal: (_hermite, lambda d: lambda noise: d.loc + d.scale * noise),
    td.LogNormal: (_hermite, lambda d: lambda noise: (d.loc + d.scale * noise).exp()),
    td.Uniform: (_legendre, lambda d: lambda noise: d.low + (d.high - d.low) * noise),
    td.Exponential: (_laguerre, lambda d: lambda noise: noise / d.rate),
}
