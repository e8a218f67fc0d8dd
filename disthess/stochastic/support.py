"""Exact expectations over one draw: all values of a finite distribution, or a Gauss rule for a reparametrised one.

Gauss-Hermite for normal, Gauss-Legendre for uniform, Gauss-Laguerre for exponential draws, and for what is made of them by
transforms: exact for polynomials of degree ``2 n - 1`` in the noise. A draw with several entries takes the product of one rule
for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch import distributions as td
from torch.distributions import Distribution
from torch.nn.functional import logsigmoid

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
    transforms: list[Any] = []
    while type(inner) is td.TransformedDistribution:
        transforms = [*inner.transforms, *transforms]
        inner = inner.base_dist
        while isinstance(inner, td.Independent):
            inner = inner.base_dist
    rule = _RULES.get(type(inner))
    if rule is None or (
        transforms and inner.batch_shape + inner.event_shape != distribution.batch_shape + distribution.event_shape
    ):
        known = ", ".join(sorted(kind.__name__ for kind in _RULES))
        raise ProblemError(
            f"the draw {name!r} from {type(inner).__name__} has no exact expectation here: its support is not finite and there are "
            f"Gauss rules for {known} only. Use how='monte_carlo'."
        )
    noise, log_weights = rule[0](points)
    shape = inner.batch_shape + inner.event_shape
    entries = math.prod(shape)
    transform = rule[1](inner)

    def point(number: int) -> tuple[Tensor, Tensor]:
        digits = _digits(number, points, entries)
        value: Tensor = transform(torch.tensor(noise[digits]).reshape(tuple(shape)))
        for step in transforms:
            value = step(value)
        return value, torch.tensor(float(log_weights[digits].sum()), dtype=torch.float64)

    return Support(points**entries, False, point)


def log_prob(distribution: Distribution, value: Tensor) -> Tensor:
    """``log p(value)``, one entry for each entry of the batch shape, with second derivatives everywhere.

    That of torch's binomial is made of pieces that meet at even odds, where autograd's second derivative of it is 0.
    """
    if isinstance(distribution, td.Independent):
        inner = log_prob(distribution.base_dist, value)
        count = distribution.reinterpreted_batch_ndims
        return inner.sum(tuple(range(-count, 0))) if count else inner
    if type(distribution) is td.Binomial:
        total, logits = distribution.total_count, distribution.logits
        ways = torch.lgamma(total + 1) - torch.lgamma(value + 1) - torch.lgamma(total - value + 1)
        return ways + value * logsigmoid(logits) + (total - value) * logsigmoid(-logits)
    found: Tensor = distribution.log_prob(value)
    return found


def _finite(distribution: Distribution, inner: Distribution) -> Support:
    values = inner.enumerate_support(expand=False)
    flat = values.reshape((values.shape[0], *inner.event_shape))
    entries = math.prod(inner.batch_shape)

    def point(number: int) -> tuple[Tensor, Tensor]:
        digits = _digits(number, len(flat), entries)
        value = flat[torch.as_tensor(digits)].reshape((*inner.batch_shape, *inner.event_shape))
        return value, log_prob(distribution, value).sum()

    return Support(len(flat) ** entries, True, point)


def _digits(number: int, base: int, count: int) -> np.ndarray:
    digits = np.zeros(count, dtype=np.int64)
    for place in range(count):
        number, digits[place] = divmod(number, base)
    return digits


@lru_cache(maxsize=32)
def _hermite(points: int) -> tuple[np.ndarray, np.ndarray]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    with np.errstate(divide="ignore"):  # far out weights underflow to 0
        return nodes, np.log(weights / weights.sum())


@lru_cache(maxsize=32)
def _legendre(points: int) -> tuple[np.ndarray, np.ndarray]:
    nodes, weights = np.polynomial.legendre.leggauss(points)
    return 0.5 * (nodes + 1), np.log(0.5 * weights)


@lru_cache(maxsize=32)
def _laguerre(points: int) -> tuple[np.ndarray, np.ndarray]:
    nodes, weights = np.polynomial.laguerre.laggauss(points)
    with np.errstate(divide="ignore"):
        return nodes, np.log(weights)


_RULES: dict[type, tuple[Callable[[int], tuple[np.ndarray, np.ndarray]], Callable[..., Callable[[Tensor], Tensor]]]] = {
    td.Normal: (_hermite, lambda d: lambda noise: d.loc + d.scale * noise),
    td.MultivariateNormal: (_hermite, lambda d: lambda noise: d.loc + (d.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)),
    td.LogNormal: (_hermite, lambda d: lambda noise: (d.loc + d.scale * noise).exp()),
    td.Uniform: (_legendre, lambda d: lambda noise: d.low + (d.high - d.low) * noise),
    td.Exponential: (_laguerre, lambda d: lambda noise: noise / d.rate),
}
