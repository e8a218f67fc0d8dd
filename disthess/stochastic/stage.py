"""A random objective as an ordinary one: each evaluation with the draws it is given, its costs weighed by DiCE.

``sum_c c exp(tau_c - stop(tau_c))`` over costs c, tau_c the log-probability of the score draws that c depends on: its
derivatives, of any order, are on average those of the expectation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from disthess.errors import ProblemError
from disthess.stochastic.bends import Bend, Trace
from disthess.stochastic.draw import AbstractDraw, PointDraw, RandomDraw

RandomObjective = Callable[[nn.Module, Any, AbstractDraw], Any]
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
        self.draw: AbstractDraw = RandomDraw((0,), 0, frozenset())
        self.rows: frozenset[int] = frozenset()
        self.plain = 0.0
        self.terms: list[tuple[Tensor, tuple[str, ...]]] = []
        self.bends: tuple[Bend, ...] = ()

    def check(self, model: nn.Module, batch: Any) -> None:
        """One evaluation in which torch.distributions checks its arguments."""
        with torch.no_grad():
            _terms(self._objective(model, batch, RandomDraw((0,), 0, frozenset())), ())

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """One evaluation: the DiCE surrogate; ``exp(log weight) cost``; or ``log p(y, z)``."""
        self.draw.drawn.clear()
        # Checks of arguments would look like a program that branches on what was drawn.
        checks = Distribution._validate_args
        Distribution.set_default_validate_args(False)
        self.draw.trace = trace = Trace()
        try:
            with trace:
                loss = self._loss(model, batch, trace)
        finally:
            self.draw.trace = None
            Distribution.set_default_validate_args(checks)
        self.bends = trace.bends(loss)
        return loss

    def _loss(self, model: nn.Module, batch: Any, trace: Trace) -> Tensor:
        self.terms = _terms(self._objective(model, batch, self.draw), tuple(self.draw.drawn))
        value = torch.stack([value.sum() for value, _ in self.terms]).sum()
        self.plain = float(value.detach())
        if isinstance(self.draw, PointDraw):
            if self.mode == "joint":
                return value + self.draw.log_weight
            return value * torch.exp(self.draw.log_weight)
        if self.mode == "joint":
            return value + sum(entry.log_prob.sum() for entry in self.draw.drawn.values() if entry.way == "score")
        return torch.stack([self._dice(place, trace) for place in range(len(self.terms))]).sum()

    def _dice(self, place: int, trace: Trace) -> Tensor:
        """``value exp(tau - stop(tau))``; row by row where the cost's rows depend on the draws' own rows alone.

        tau has the draws that the cost names, those that it was seen to depend on, and the ancestors of both.
        """
        value, names = self.terms[place]
        unknown = [name for name in names if name not in self.draw.drawn]
        if unknown:
            known = ", ".join(self.draw.drawn) or "none"
            raise ProblemError(f"a cost names the draw {unknown[0]!r}, which was not made; there are: {known}.")
        direct = trace.sources(value).union(names)
        every = direct.union(*(self.draw.drawn[name].ancestors for name in direct))
        taus = [entry.log_prob for name, entry in self.draw.drawn.items() if name in every and entry.way == "score"]
        if not taus:
            return value.sum()
        rows = place in self.rows and has_rows(value, taus)
        tau = torch.stack([entry.reshape(len(value), -1).sum(1) if rows else entry.sum() for entry in taus]).sum(0)
        return (value * torch.exp(tau - tau.detach())).sum()


def has_rows(value: Tensor, taus: Sequence[Tensor]) -> bool:
    """Whether a cost and the log-probabilities of its draws have one entry for each of the same number of rows."""
    return value.ndim == 1 and all(tau.ndim >= 1 and len(tau) == len(value) for tau in taus)


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
