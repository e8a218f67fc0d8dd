"""Random draws inside an objective: what the objective calls, and the ways a draw is answered.

An objective of a random loss is ``objective(model, batch, draw)`` and asks ``draw("z", distribution)`` for each random value. How
the value comes about, and what the derivative of its distribution adds, is decided here and not by the objective.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution
from typing_extensions import override

from disthess.errors import ProblemError
from disthess.stochastic.bends import Trace
from disthess.stochastic.support import Support, log_prob, support_of

Way = Literal["pathwise", "score"]


@dataclass(slots=True)
class Drawn:
    """What was drawn under one name.

    Attributes:
        way: ``pathwise``: the value is a differentiable function of fixed noise; ``score``: the value is fixed, and its
            log-probability carries the derivative.
        value: The value.
        log_prob: Of the value, one entry for each entry of the distribution's batch shape; 0 for pathwise draws.
        ancestors: Names of the draws that its distribution depends on, directly or through others.
    """

    way: Way
    value: Tensor
    log_prob: Tensor
    ancestors: frozenset[str]


class AbstractDraw(abc.ABC):
    """Answers the draws of one evaluation of the objective."""

    def __init__(self) -> None:
        self.drawn: dict[str, Drawn] = {}
        self.trace: Trace | None = None

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
        way, value = self._answer(name, distribution)
        before = frozenset(self.drawn)
        if self.trace is not None:
            before = self.trace.mark(name, value, not is_discrete(distribution, value), fixed=way == "score")
        scored = value.new_zeros(())
        if way == "score":
            _check_support(name, distribution)
            scored = log_prob(distribution, value)
            if self.trace is not None:
                before = before | (self.trace.sources(scored) - {name})
        ancestors = before.union(*(self.drawn[other].ancestors for other in before if other in self.drawn))
        self.drawn[name] = Drawn(way, value, scored if scored.numel() else scored.sum(), ancestors)
        return value

    @abc.abstractmethod
    def _answer(self, name: str, distribution: Distribution) -> tuple[Way, Tensor]: ...


def _check_support(name: str, distribution: Distribution) -> None:
    """Refuse the score function where what can be drawn depends on the parameters: log p has no derivative at the edge."""
    try:
        constraint: Any = distribution.support
    except NotImplementedError:
        return
    while hasattr(constraint, "base_constraint"):
        constraint = constraint.base_constraint
    if any(isinstance(bound, Tensor) and bound.requires_grad for bound in vars(constraint).values()):
        raise ProblemError(
            f"the range of the draw {name!r} from {type(distribution).__name__} depends on the parameters, so the score function "
            "misses what happens at its edge. Use estimator='pathwise', or draw from a fixed range and transform the value."
        )


def is_discrete(distribution: Distribution, value: Tensor) -> bool:
    """Whether a draw has probabilities rather than a density."""
    if not value.is_floating_point():
        return True
    try:
        support: Any = distribution.support
        return bool(support.is_discrete)
    except (NotImplementedError, AttributeError):
        return False


@final
class RandomDraw(AbstractDraw):
    """Draws from a seeded generator: the same seed gives the same noise whatever the parameters are.

    Args:
        seed: Of the run.
        number: Of this evaluation.
        score: Names whose log-probability carries the derivative, None for all; others are reparametrised where they can be.
    """

    def __init__(self, seed: Sequence[int], number: int, score: frozenset[str] | None) -> None:
        super().__init__()
        self._seed = seed
        self._number = number
        self._score = score

    @override
    def _answer(self, name: str, distribution: Distribution) -> tuple[Way, Tensor]:
        scored = self._score is None or name in self._score or not distribution.has_rsample
        with _seeded(_mixed(*self._seed, self._number, len(self.drawn))):
            value = distribution.sample() if scored else distribution.rsample()
        return ("score", value.detach()) if scored else ("pathwise", value)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators, from which torch.distributions draws; the CPU's is put back as it was."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


def _mixed(*numbers: int) -> int:
    """A seed of its own for each tuple of numbers: sums of them would let one sample's second draw repeat another's first."""
    return int(
        np.random.SeedSequence([number & (2**64 - 1) for number in numbers]).generate_state(1, np.uint64)[0] >> 1
    )


@final
class OtherRows(AbstractDraw):
    """The same draws as another evaluation, but for some rows of those whose log-probability carries the derivative.

    Args:
        seed: As in `RandomDraw`.
        number: As in `RandomDraw`.
        score: As in `RandomDraw`.
        rows: Mask of the rows to draw again, ``[rows]``.
    """

    def __init__(self, seed: Sequence[int], number: int, score: frozenset[str] | None, rows: Tensor) -> None:
        super().__init__()
        self._seed = seed
        self._number = number
        self._score = score
        self._rows = rows

    @override
    def _answer(self, name: str, distribution: Distribution) -> tuple[Way, Tensor]:
        like = RandomDraw(self._seed, self._number, self._score)
        like.drawn = dict(self.drawn)
        way, value = like._answer(name, distribution)
        if way == "score" and value.ndim and len(value) == len(self._rows):
            rows = self._rows.reshape(-1, *[1] * (value.ndim - 1))
            value = torch.where(rows, _another(distribution, value), value)
        return way, value


def _another(distribution: Distribution, value: Tensor) -> Tensor:
    """A value that differs from the given one in every row, where the distribution has another."""
    flat = value.reshape(len(value), -1)
    if distribution.has_enumerate_support:
        tries = list(distribution.enumerate_support())
    else:
        with _seeded(1):
            tries = [distribution.sample() for _ in range(10)]
    found = flat.clone()
    for other in tries:
        entries = other.reshape(len(value), -1)
        same = (found == flat).all(1, keepdim=True)
        found = torch.where(same, entries, found)
    return found.reshape(value.shape)


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
    def _answer(self, name: str, distribution: Distribution) -> tuple[Way, Tensor]:
        support: Support = support_of(name, distribution, self._points)
        place = len(self.sizes)
        choice = self._choices[place] if place < len(self._choices) else 0
        value, log_weight = support.point(choice)
        self.sizes.append(support.size)
        self.log_weight = self.log_weight + log_weight
        return ("score" if support.discrete else "pathwise"), value
