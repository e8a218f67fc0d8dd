"""Hessians of expected losses, exactly by enumeration and quadrature, or by Monte Carlo with standard errors.

Reparametrised draws with fixed noise xi_m: ``hess E L = E hess L(theta, xi)``, estimated by the mean over m: the exact Hessian of
the sampled objective. Draws that cannot be reparametrised: with ``s = grad log p``,

    hess E_p L = E [ L (s s^T + hess log p) + grad L s^T + s grad L^T + hess L ],

which autograd gives, differentiating twice, from ``L exp(tau - stop(tau))``, tau the log-probability of all draws that the cost
depends on (DiCE). ``L tau`` would be wrong at second order. For a marginal likelihood ``-log E_p p(y | z)``, Louis's identity:

    hess = -( E_post hess log p(y, z) + Cov_post grad log p(y, z) ).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from disthess.errors import ConfigError, ProblemError
from disthess.hvp import GradientTape
from disthess.problem import Problem
from disthess.stochastic.bends import kinks_after
from disthess.stochastic.draw import AbstractDraw, PointDraw, RandomDraw

RandomObjective = Callable[[nn.Module, Any, AbstractDraw], Any]
How = Literal["auto", "exact", "monte_carlo"]
Estimator = Literal["auto", "pathwise", "score"]


@dataclass(frozen=True, slots=True)
class ExpectedHessian:
    """The Hessian of an expected loss.

    Attributes:
        matrix: ``[P, P]``, in ``named_parameters()`` order.
        standard_error: Of each entry, ``[P, P]``: the spread of the mean over samples; 0 where the result is exact.
        gradient: ``[P]``.
        loss: The expected loss.
        loss_error: Its standard error.
        how: ``exact`` or ``monte_carlo``.
        count: Points or samples.
        quadrature_error: Of an exact result with Gauss rules: the largest change of an entry when each rule has twice the
            points; 0 for enumerations, which have no such error.
        ways: How each draw was differentiated: ``pathwise``, ``score``, ``enumerated`` or ``quadrature``.
        names: Parameters, in order.
        sizes: Entries of each.
    """

    matrix: np.ndarray
    standard_error: np.ndarray
    gradient: np.ndarray
    loss: float
    loss_error: float
    how: str
    count: int
    quadrature_error: float
    ways: dict[str, str]
    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def interval(self, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper ends of an interval for each entry, ``[P, P]`` each: Student's t on the samples.

        Raises:
            ConfigError: ``confidence`` is not between 0 and 1.
        """
        if not 0 < confidence < 1:
            raise ConfigError(f"confidence must be between 0 and 1, got {confidence!r}.")
        factor = float(stats.t.ppf(0.5 + confidence / 2, max(1, self.count - 1)))
        return self.matrix - factor * self.standard_error, self.matrix + factor * self.standard_error

    def block(self, a: str, b: str) -> np.ndarray:
        """The block of two parameters.

        Raises:
            ConfigError: There is no such parameter.
        """
        for name in (a, b):
            if name not in self.names:
                raise ConfigError(f"no parameter {name!r}; there are {', '.join(self.names)}.")
        ends = np.cumsum((0, *self.sizes))
        rows, columns = self.names.index(a), self.names.index(b)
        return self.matrix[ends[rows] : ends[rows + 1], ends[columns] : ends[columns + 1]]


Mode = Literal["dice", "weighted", "joint"]


@final
class Stage:
    """An objective with the draws of the current evaluation: the random loss as one that `Problem` understands.

    Args:
        objective: The user's.
    """

    def __init__(self, objective: RandomObjective) -> None:
        self._objective = objective
        self.mode: Mode = "dice"
        self.draw: AbstractDraw = RandomDraw(0, frozenset())
        self.plain = 0.0
        self.value = torch.zeros(())

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """One evaluation: the DiCE surrogate; ``exp(log weight) cost``; or ``log p(y, z)``."""
        self.draw.drawn.clear()
        terms = _terms(self._objective(model, batch, self.draw), tuple(self.draw.drawn))
        self.value = torch.stack([value.sum() for value, _ in terms]).sum()
        self.plain = float(self.value.detach())
        if isinstance(self.draw, PointDraw):
            if self.mode == "joint":
                return self.value + self.draw.log_weight
            return self.value * torch.exp(self.draw.log_weight)
        if self.mode == "joint":
            return self.value + sum(entry.log_prob.sum() for entry in self.draw.drawn.values() if entry.way == "score")
        return torch.stack([self._dice(value, names) for value, names in terms]).sum()

    def _dice(self, value: Tensor, names: Sequence[str]) -> Tensor:
        """``value exp(tau - stop(tau))``; row by row where the cost has one entry for each row of the draws."""
        unknown = [name for name in names if name not in self.draw.drawn]
        if unknown:
            known = ", ".join(self.draw.drawn) or "none"
            raise ProblemError(f"a cost names the draw {unknown[0]!r}, which was not made; there are: {known}.")
        taus = [self.draw.drawn[name].log_prob for name in names if self.draw.drawn[name].way == "score"]
        if not taus:
            return value.sum()
        rows = value.ndim == 1 and all(tau.ndim >= 1 and len(tau) == len(value) for tau in taus)
        tau = torch.stack([entry.reshape(len(value), -1).sum(1) if rows else entry.sum() for entry in taus]).sum(0)
        return (value * torch.exp(tau - tau.detach())).sum()


def _terms(returned: Any, drawn: tuple[str, ...]) -> list[tuple[Tensor, tuple[str, ...]]]:
    """What the objective returned as (cost, names of the draws that it depends on)."""
    given = returned if isinstance(returned, (list, tuple)) else [returned]
    found = []
    for term in given:
        value, names = term if isinstance(term, tuple) and len(term) == 2 else (term, drawn)
        if not isinstance(value, Tensor):
            raise ProblemError(
                f"the objective must return a tensor, or a list of costs (tensor, names of its draws); got {type(value).__name__}."
            )
        found.append((value, (names,) if isinstance(names, str) else tuple(names)))
    return found


@dataclass(frozen=True, slots=True)
class Outcome:
    """Loss, gradient and Hessian of one batch, with their standard errors."""

    loss: float
    gradient: np.ndarray
    matrix: np.ndarray
    loss_error: float
    matrix_error: np.ndarray
    count: int
    quadrature_error: float


@final
class Expectation:
    """Computes them for one batch.

    Args:
        problem: In float64, of one batch, whose objective is the stage.
        stage: The random objective.
        names: Parameters to differentiate by.
        marginal: Whether the loss is ``-log E exp(objective)``.
    """

    def __init__(self, problem: Problem, stage: Stage, names: Sequence[str], marginal: bool) -> None:
        self._problem = problem
        self._stage = stage
        self._names = tuple(names)
        self._marginal = marginal
        stage.mode = "joint" if marginal else "dice"
        by_name = {parameter.name: parameter.tensor.numel() for parameter in problem.parameters()}
        self._numel = sum(by_name[name] for name in names)

    def ways(self, score: frozenset[str], points: int | None, allow_kinks: bool = False) -> dict[str, str]:
        """How each draw is differentiated, after one evaluation; with kinks behind pathwise draws looked for.

        Args:
            score: Names for the score function.
            points: Of the Gauss rules; None for Monte Carlo.
            allow_kinks: Do not look for them.

        Raises:
            PathwiseKink: A kink lies between a pathwise draw and the loss.
        """
        self._stage.draw = RandomDraw(0, score) if points is None else PointDraw((), points)
        GradientTape(self._problem, 0, self._names)
        found = {}
        for name, entry in self._stage.draw.drawn.items():
            if entry.way == "pathwise" and not allow_kinks:
                kinks = kinks_after(self._stage.value, entry.value)
                if kinks:
                    raise PathwiseKink(name, kinks)
            exact = "enumerated" if entry.way == "score" else "quadrature"
            found[name] = entry.way if points is None else exact
        return found

    def needed_points(self, points: int) -> float:
        """How many points an exact sum would take, judged by its first path."""
        draw = PointDraw((), points)
        self._stage.draw = draw
        GradientTape(self._problem, 0, self._names)
        return float(np.prod([float(size) for size in draw.sizes]))

    def exact(self, points: int, max_points: int) -> Outcome:
        """Sum over all points; Gauss rules are compared with those of twice the points.

        Raises:
            ProblemError: Too many points, or a distribution without a rule.
        """
        loss, gradient, matrix, count = self._summed(points, max_points)
        error = 0.0
        if "quadrature" in self.ways(frozenset(), points, allow_kinks=True).values():
            error = float(np.abs(self._summed(2 * points, 2**20)[2] - matrix).max()) if count <= 4096 else float("nan")
        return Outcome(loss, gradient, matrix, 0.0, np.zeros_like(matrix), count, error)

    def monte_carlo(self, samples: int, seed: int, score: frozenset[str]) -> Outcome:
        """Mean over samples, with the standard error of every entry."""
        draws = (RandomDraw(1_000_003 * seed + number, score) for number in range(samples))
        if self._marginal:
            return _louis_error([self._evaluate(draw) for draw in draws])
        moments = (_Moments(), _Moments(), _Moments())
        for draw in draws:
            _, first, second, plain = self._evaluate(draw)
            for moment, value in zip(moments, (np.array(plain), first, second), strict=True):
                moment.add(value)
        loss, gradient, matrix = moments
        return Outcome(float(loss.mean), gradient.mean, matrix.mean, float(loss.error), matrix.error, samples, 0.0)

    def _summed(self, points: int, max_points: int) -> tuple[float, np.ndarray, np.ndarray, int]:
        found: list[tuple[float, np.ndarray, np.ndarray, float]] = []
        choices: list[int] | None = []
        while choices is not None:
            draw = PointDraw(choices, points)
            found.append(self._evaluate(draw))
            needed = float(np.prod([float(size) for size in draw.sizes]))
            if len(found) > max_points or (len(found) == 1 and needed > max_points):
                raise ProblemError(
                    f"an exact expectation needs {needed:,.0f} points or more ({points} for each entry of a continuous draw), and "
                    f"max_points allows {max_points:,}. Use how='monte_carlo', fewer points, or raise it."
                )
            choices = _next(choices, draw.sizes)
        values = np.array([entry[0] for entry in found])
        gradients, hessians = np.stack([entry[1] for entry in found]), np.stack([entry[2] for entry in found])
        if self._marginal:
            loss, gradient, matrix = louis(values, gradients, hessians)
            return loss, gradient, matrix, len(found)
        return float(values.sum()), gradients.sum(0), hessians.sum(0), len(found)

    def _evaluate(self, draw: AbstractDraw) -> tuple[float, np.ndarray, np.ndarray, float]:
        """What the stage returns, its gradient and Hessian, and the plain cost."""
        self._stage.draw = draw
        tape = GradientTape(self._problem, 0, self._names)
        plain = self._stage.plain
        matrix = tape.products(torch.eye(self._numel, dtype=torch.float64)).numpy()
        return float(tape.loss.detach()), tape.gradient().numpy(), 0.5 * (matrix + matrix.T), plain


@final
class PathwiseKink(ProblemError):
    """The loss has a kink in a reparametrised draw.

    Args:
        name: Of the draw.
        kinks: Operations between it and the loss.
    """

    def __init__(self, name: str, kinks: Sequence[str]) -> None:
        super().__init__(
            f"the loss has kinks in the draw {name!r} ({', '.join(kinks)}): the pathwise estimator of a Hessian misses the "
            "curvature on them, whatever the number of samples. Use estimator='auto' or 'score' with how='monte_carlo'; pass "
            "allow_kinks=True if you know that the first derivative does not jump."
        )
        self.draw = name


def louis(logs: np.ndarray, gradients: np.ndarray, hessians: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """``-log sum_i e^(l_i)`` with its gradient and Hessian, from those of each ``l_i = log p(y, z_i)``.

    ``H = -(E_post hess l + Cov_post grad l)``, the posterior being ``softmax(l)``.

    Args:
        logs: ``[m]``.
        gradients: ``[m, P]``.
        hessians: ``[m, P, P]``.
    """
    top = float(logs.max())
    weights = np.exp(logs - top)
    total = float(weights.sum())
    weights = weights / total
    mean = weights @ gradients
    centred = gradients - mean
    matrix = -(np.tensordot(weights, hessians, axes=1) + (weights[:, None] * centred).T @ centred)
    return -(top + float(np.log(total))), -mean, matrix


def _louis_error(found: Sequence[tuple[float, np.ndarray, np.ndarray, float]]) -> Outcome:
    """Weights ``p(y | z)`` of draws from the prior; errors by leaving out one of twenty groups at a time."""
    gradients, hessians = np.stack([entry[1] for entry in found]), np.stack([entry[2] for entry in found])
    logs = np.array([entry[3] for entry in found])
    groups = np.arange(len(found)) % GROUPS
    whole = louis(logs - np.log(len(logs)), gradients, hessians)
    parts = [
        louis(logs[keep] - np.log(keep.sum()), gradients[keep], hessians[keep])
        for keep in (groups != group for group in range(min(GROUPS, len(found))))
    ]
    count = len(parts)

    def error(place: int) -> Any:
        values = np.stack([np.asarray(part[place]) for part in parts])
        return np.sqrt((count - 1) / count * ((values - values.mean(0)) ** 2).sum(0))

    return Outcome(whole[0], whole[1], whole[2], float(error(0)), error(2), len(found), 0.0)


GROUPS = 20
"""Of the jackknife."""


def _next(choices: Sequence[int], sizes: Sequence[int]) -> list[int] | None:
    """The next path through a tree whose branching was just seen; None after the last."""
    path = [*choices, *[0] * (len(sizes) - len(choices))]
    for place in reversed(range(len(path))):
        if path[place] + 1 < sizes[place]:
            return [*path[:place], path[place] + 1]
    return None


@final
class _Moments:
    """Running mean and standard error (Welford)."""

    def __init__(self) -> None:
        self._count = 0
        self._mean: Any = 0.0
        self._squares: Any = 0.0

    def add(self, value: np.ndarray) -> None:
        self._count += 1
        step = value - self._mean
        self._mean = self._mean + step / self._count
        self._squares = self._squares + step * (value - self._mean)

    @property
    def mean(self) -> Any:
        return self._mean

    @property
    def error(self) -> Any:
        if self._count < 2:
            return self._mean * np.nan
        return np.sqrt(self._squares / (self._count * (self._count - 1)))
