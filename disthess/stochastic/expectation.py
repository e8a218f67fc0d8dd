"""Hessians of expected losses, exactly by enumeration and quadrature, or by Monte Carlo with standard errors.

Reparametrised draws with fixed noise xi_m: ``hess E L = E hess L(theta, xi)``, estimated by the mean over m: the exact Hessian of
the sampled objective. Draws that cannot be reparametrised: with ``s = grad log p``,

    hess E_p L = E [ L (s s^T + hess log p) + grad L s^T + s grad L^T + hess L ],

which autograd gives, differentiating twice, from ``L exp(tau - stop(tau))``, tau the log-probability of all draws that the cost
depends on (DiCE). ``L tau`` would be wrong at second order. For a marginal likelihood ``-log E_p p(y | z)``, Louis's identity:

    hess = -( E_post hess log p(y, z) + Cov_post grad log p(y, z) ).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from disthess.errors import ConfigError, ProblemError
from disthess.hvp import GradientTape
from disthess.problem import Problem
from disthess.stochastic.bends import Bend, is_twice_differentiable
from disthess.stochastic.draw import AbstractDraw, OtherRows, PointDraw, RandomDraw
from disthess.stochastic.outcome import Moments, Outcome, jackknifed, louis
from disthess.stochastic.stage import Stage

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
        degrees: Degrees of freedom of the standard errors: samples less one, or the groups of a marginal's jackknife less one.
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
    degrees: int
    quadrature_error: float
    ways: dict[str, str]
    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def interval(self, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper ends of an interval for each entry, ``[P, P]`` each: ``matrix -+ t standard_error``, t Student's.

        Raises:
            ConfigError: ``confidence`` is not between 0 and 1.
        """
        if not 0 < confidence < 1:
            raise ConfigError(f"confidence must be between 0 and 1, got {confidence!r}.")
        factor = float(stats.t.ppf(0.5 + confidence / 2, self.degrees))
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
        self._allow_kinks = False
        self._checked = False
        self._twice: set[str] = set()
        stage.mode = "joint" if marginal else "dice"
        stage.rows = frozenset()
        by_name = {parameter.name: parameter.tensor.numel() for parameter in problem.parameters()}
        self._numel = sum(by_name[name] for name in names)

    def ways(self, score: frozenset[str] | None, points: int | None, allow_kinks: bool = False) -> dict[str, str]:
        """How each draw is differentiated, after one evaluation.

        Args:
            score: Names for the score function; None for all.
            points: Of the Gauss rules; None for Monte Carlo.
            allow_kinks: See `expected_hessian`.

        Raises:
            EstimatorError: A draw cannot be differentiated so.
        """
        self._allow_kinks = allow_kinks
        if not self._checked:
            self._stage.check(self._problem.model, self._problem.batches[0])
            self._checked = True
        self._tape(RandomDraw((0,), 0, score) if points is None else PointDraw((), points))
        exact = {"score": "enumerated", "pathwise": "quadrature"}
        drawn = self._stage.draw.drawn
        return {name: entry.way if points is None else exact[entry.way] for name, entry in drawn.items()}

    def needed_points(self, points: int) -> float:
        """How many points an exact sum would take, judged by its first path."""
        draw = PointDraw((), points)
        self._tape(draw)
        return float(np.prod([float(size) for size in draw.sizes]))

    def exact(self, points: int, max_points: int) -> Outcome:
        """Sum over all points; Gauss rules are compared with those of twice the points.

        Raises:
            ProblemError: Too many points, or a distribution without a rule.
        """
        loss, gradient, matrix, count = self._summed(points, max_points)
        error = 0.0
        if "quadrature" in self.ways(frozenset(), points, self._allow_kinks).values():
            error = float(np.abs(self._summed(2 * points, 2**20)[2] - matrix).max()) if count <= 4096 else float("nan")
        return Outcome(loss, gradient, matrix, 0.0, np.zeros_like(matrix), count, count, error)

    def monte_carlo(self, samples: int, seed: Sequence[int], score: frozenset[str] | None) -> Outcome:
        """Mean over samples, with the standard error of every entry.

        Raises:
            EstimatorError: A draw cannot be differentiated as asked.
        """
        self._stage.rows = self._independent_rows(seed, score)
        draws = (RandomDraw(seed, number, score) for number in range(samples))
        if self._marginal:
            return jackknifed([self._evaluate(draw) for draw in draws])
        moments = (Moments(), Moments(), Moments())
        for draw in draws:
            _, first, second, plain = self._evaluate(draw)
            for moment, value in zip(moments, (np.array(plain), first, second), strict=True):
                moment.add(value)
        loss, gradient, matrix = moments
        return Outcome(
            float(loss.mean), gradient.mean, matrix.mean, float(loss.error), matrix.error, samples, samples - 1, 0.0
        )

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
        tape = self._tape(draw)
        plain = self._stage.plain
        matrix = tape.products(torch.eye(self._numel, dtype=torch.float64)).numpy()
        return float(tape.loss.detach()), tape.gradient().numpy(), 0.5 * (matrix + matrix.T), plain

    def _tape(self, draw: AbstractDraw) -> GradientTape:
        """One evaluation and its gradient, after a look at what the draws meet on their way to the loss."""
        self._stage.draw = draw
        try:
            tape = GradientTape(self._problem, 0, self._names)
        except ProblemError:
            # A jump can cut the loss off from the parameters: that is what is wrong then, if there is one.
            self._inspect()
            raise
        self._inspect()
        return tape

    def _inspect(self) -> None:
        drawn = self._stage.draw.drawn
        for name, entry in drawn.items():
            if entry.way == "pathwise" and name not in self._twice:
                if not is_twice_differentiable(entry.value):
                    raise EstimatorError.once(name)
                self._twice.add(name)
        if self._stage.bends and not self._allow_kinks:
            bend = self._stage.bends[0]
            pathwise = [
                name for name in bend.draws if drawn[name].way == "pathwise" and drawn[name].value.requires_grad
            ]
            raise EstimatorError.kinked(self._stage.bends, bend.draws[-1], pathwise[-1] if pathwise else None)

    def _independent_rows(self, seed: Sequence[int], score: frozenset[str] | None) -> frozenset[int]:
        """Which costs have rows that depend on the same rows of their draws alone, by drawing other rows again.

        Every two rows differ in a digit of their numbers; so the rows with a 0 there, and then those with a 1, are drawn again.
        """
        batch = self._problem.batches[0]

        def costs(draw: AbstractDraw) -> list[Tensor]:
            self._stage.draw = draw
            with torch.no_grad():
                self._problem.value(batch, {})
            return [value.detach().clone() for value, _ in self._stage.terms]

        plain = costs(RandomDraw(seed, 0, score))
        taus = [
            entry.log_prob for entry in self._stage.draw.drawn.values() if entry.way == "score" and entry.log_prob.ndim
        ]
        found = {
            place for place, value in enumerate(plain) if value.ndim == 1 and any(len(value) == len(t) for t in taus)
        }
        if self._marginal or not found:
            return frozenset()
        for size in {len(plain[place]) for place in found}:
            for digit in range(max(1, (size - 1).bit_length())):
                for side in (0, 1):
                    again = (torch.arange(size) >> digit) % 2 == side
                    other = costs(OtherRows(seed, 0, score, again))
                    if len(other) != len(plain):
                        return frozenset()
                    for place in tuple(found):
                        if len(plain[place]) == size and not torch.equal(other[place][~again], plain[place][~again]):
                            found.discard(place)
        return frozenset(found)


@final
class EstimatorError(ProblemError):
    """A draw cannot be differentiated as asked.

    Args:
        text: What is wrong.
        draw: A pathwise draw that the score function could take over; None if that would not help.
    """

    def __init__(self, text: str, draw: str | None) -> None:
        super().__init__(text)
        self.draw = draw

    @classmethod
    def once(cls, name: str) -> EstimatorError:
        """A reparametrised draw of which torch has first derivatives only."""
        return cls(
            f"torch has no second derivative of the reparametrised draw {name!r} by the parameters of its distribution, so the "
            "pathwise estimator has no Hessian. Use estimator='auto' or 'score' with how='monte_carlo'.",
            name,
        )

    @classmethod
    def kinked(cls, bends: Sequence[Bend], name: str, pathwise: str | None) -> EstimatorError:
        """Kinks or jumps that move with the parameters against the noise."""
        ops = ", ".join(bend.op for bend in bends)
        if pathwise is None:
            return cls(
                f"the loss has kinks in the draw {name!r} ({ops}) that move with the parameters other than through a "
                "reparametrised value: neither the pathwise estimator nor the score function sees the curvature on them. Draw the "
                "value that meets the kink itself (draw('z', Normal(mu, sigma)) instead of mu + sigma * noise), from a "
                "distribution whose log density is smooth in its parameters; or pass allow_kinks=True if you know that no first "
                "derivative jumps.",
                None,
            )
        return cls(
            f"the loss has kinks in the draw {pathwise!r} ({ops}): the pathwise estimator of a Hessian misses the curvature on "
            "them, whatever the number of samples. Use estimator='auto' or 'score' with how='monte_carlo'; pass allow_kinks=True "
            "if you know that the first derivative does not jump.",
            pathwise,
        )


def _next(choices: Sequence[int], sizes: Sequence[int]) -> list[int] | None:
    """The next path through a tree whose branching was just seen; None after the last."""
    path = [*choices, *[0] * (len(sizes) - len(choices))]
    for place in reversed(range(len(path))):
        if path[place] + 1 < sizes[place]:
            return [*path[:place], path[place] + 1]
    return None
