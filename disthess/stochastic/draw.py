"""Random draws inside an objective: what the objective calls, and the ways a draw is answered.

An objective of a random loss is ``objective(model, batch, draw)`` and asks ``draw("z", distribution)`` for each random value. How
the value comes about, and what the derivative of its distribution adds, is decided here and not by the objective.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor
from torch.distributions import Distribution
from typing_extensions import override

from disthess.errors import ProblemError
from disthess.stochastic.support import Support, support_of

Way = Literal["pathwise", "score"]


@dataclass(slots=True)
class Drawn:
    """What was drawn under one name.

    Attributes:
        way: ``pathwise``: the value is a differentiable function of fixed noise; ``score``: the value is fixed, and its
            log-probability carries the derivative.
        value: The value.
        log_prob: Of the value, one entry for each entry of the distribution's batch shape.
    """

    way: Way
    value: Tensor
    log_prob: Tensor


class AbstractDraw(abc.ABC):
    """Answers the draws of one evaluation of the objective."""

    def __init__(self) -> None:
        self.drawn: dict[str, Drawn] = {}

    def __call__(self, name: str, distribution: Distribution) -> Tensor:
        """The value drawn under ``name`` from a ``torch.distributions`` distribution.

        Raises:
            ProblemError: The name was drawn before, or the distribution cannot be treated as asked.
        """
        if name in self.drawn:
            raise ProblemError(f"the objective draws {name!r} twice; give each draw a name of its own.")
        if not isinstance(distribution, Distribution):
            raise ProblemError(
                f"draw({name!r}, ...) expects a torch.distributions.Distribution, got {type(distribution).__name__}."
            )
        found = self._answer(name, distribution)
        self.drawn[name] = found
        return found.value

    @abc.abstractmethod
    def _answer(self, name: str, distribution: Distribution) -> Drawn: ...


@final
class RandomDraw(AbstractDraw):
    """Draws from a seeded generator: the same seed gives the same noise whatever the parameters are.

    Args:
        seed: Of this evaluation.
        score: Names whose log-probability carries the derivative; others are reparametrised.
    """

    def __init__(self, seed: int, score: frozenset[str]) -> None:
        super().__init__()
        self._seed = seed
        self._score = score

    @override
    def _answer(self, name: str, distribution: Distribution) -> Drawn:
        way: Way = "score" if name in self._score or not distribution.has_rsample else "pathwise"
        # torch.distributions draws from the global generator; it is put back as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed + 7919 * len(self.drawn))
            value = distribution.rsample() if way == "pathwise" else distribution.sample()
        # A view of its own, so that what depends on the draw can be told in autograd's graph.
        value = value.view_as(value) if way == "pathwise" else value.detach()
        return Drawn(way, value, distribution.log_prob(value))


@final
class PointDraw(AbstractDraw):
    """Takes prescribed points of finite supports or quadrature rules, and says how many there are at the next open draw.

    Args:
        choices: Number of the point at each draw, in order; draws beyond take point 0.
        points: Quadrature points for each entry of a continuous draw.
    """

    def __init__(self, choices: Sequence[int], points: int) -> None:
        super().__init__()
        self._choices = tuple(choices)
        self._points = points
        self.sizes: list[int] = []
        self.log_weight: Tensor = torch.zeros((), dtype=torch.float64)

    @override
    def _answer(self, name: str, distribution: Distribution) -> Drawn:
        support: Support = support_of(name, distribution, self._points)
        place = len(self.sizes)
        choice = self._choices[place] if place < len(self._choices) else 0
        value, log_weight = support.point(choice)
        self.sizes.append(support.size)
        self.log_weight = self.log_weight + log_weight
        way: Way = "score" if support.discrete else "pathwise"
        log_prob = distribution.log_prob(value)
        return Drawn(way, value, log_prob if math.prod(log_prob.shape) else log_prob.sum())
