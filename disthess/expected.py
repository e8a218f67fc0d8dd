"""Hessians of expected losses: what users call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from disthess.errors import ConfigError, ProblemError
from disthess.prepare import select_parameters
from disthess.problem import Problem
from disthess.stochastic.expectation import (
    Estimator,
    EstimatorError,
    Expectation,
    ExpectedHessian,
    How,
)
from disthess.stochastic.outcome import Outcome
from disthess.stochastic.stage import RandomObjective, Stage


def expected_hessian(
    model: nn.Module,
    objective: RandomObjective,
    batches: Sequence[Any],
    *,
    how: How = "auto",
    estimator: Estimator = "auto",
    marginal: bool = False,
    samples: int = 1000,
    seed: int = 0,
    points: int | None = None,
    max_points: int = 4096,
    allow_kinks: bool = False,
    parameters: str | Sequence[str] | None = None,
) -> ExpectedHessian:
    """The Hessian of ``sum_b E[loss_b]``, in float64, where the objective draws random values.

    ``objective(model, batch, draw)`` asks ``draw("z", distribution)`` for each random value, with any distribution of
    ``torch.distributions``, and returns the loss: a tensor (entries are added up), or a list of costs ``(tensor, names of the
    draws it depends on)``, which lowers the variance of the score function; draws that a cost depends on through others, or without
    its saying so, are added. A cost with one entry for each row of its draws is treated row by row, after a test that changing
    the other rows does not change it.

    Args:
        model: A module.
        objective: To be minimised (an ELBO or a reward with its sign changed); with ``marginal`` it is ``log p(y | z)``.
        batches: Each passed to the objective.
        how: ``exact`` sums over finite supports and Gauss rules, ``monte_carlo`` draws; ``auto`` is exact where that is possible
            within ``max_points``.
        estimator: Of Monte Carlo. ``pathwise`` is ``mean_m hess L(theta, xi_m)`` through reparametrised draws, the noise xi_m
            held fixed; ``score`` is ``mean_m [L (s s^T + hess log p) + grad L s^T + s grad L^T + hess L]``, ``s = grad log p``
            (DiCE), for all draws; ``auto`` is pathwise where a draw can be reparametrised, torch has its second derivatives, and
            no kink lies between it and the loss.
        marginal: The loss is ``-log E exp(objective)``, a marginal likelihood; by Louis's identity
            ``hess = -(E_post hess log p(y, z) + Cov_post grad log p(y, z))``.
        samples: Of Monte Carlo.
        seed: Of Monte Carlo: the same seed, the same noise, whatever the parameters.
        points: Of each Gauss rule; None starts with 8 and doubles them, within ``max_points``, until the result does not change.
        max_points: More are refused.
        allow_kinks: Differentiate pathwise through kinks all the same.
        parameters: Globs; default all trainable ones.

    Returns:
        The matrix with the standard error of every entry: see `ExpectedHessian`.

    Raises:
        ConfigError: An argument is wrong.
        ProblemError: A draw has no exact rule, there are too many points, or a kink that moves with the parameters (in the loss,
            or in the log density of a draw) forbids the estimator.

    Example:
        >>> from torch.distributions import Bernoulli
        >>> coin = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(coin.weight, 0.4)
        >>> found = expected_hessian(coin, lambda m, x, draw: 3 * draw("z", Bernoulli(logits=m(x))) - 1, [torch.ones(1, 1)])
        >>> round(float(found.matrix[0, 0]), 6)  # (a - b) p (1 - p) (1 - 2 p)
        -0.142265
    """
    _check(how, estimator, samples, points)
    if not batches:
        raise ConfigError("batches is empty; give at least one (anything the objective understands).")
    stage = Stage(objective)
    parts: list[tuple[Outcome, dict[str, str], str]] = []
    names: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    for number, batch in enumerate(batches):
        problem = Problem(model, objective=stage, batches=[batch]).to(torch.float64)
        names = select_parameters(problem, parameters)
        sizes = tuple(p.tensor.numel() for p in problem.parameters() if p.name in names)
        task = Expectation(problem, stage, names, marginal)
        first, exact = _how(task, how, points, max_points, allow_kinks)
        if exact:
            ways = task.ways(frozenset(), first, allow_kinks)
            parts.append((_refined(task, first, points is None, max_points), ways, "exact"))
        else:
            outcome, ways = _sampled(task, estimator, samples, (seed, number), allow_kinks)
            parts.append((outcome, ways, "monte_carlo"))
    outcomes = [part[0] for part in parts]
    return ExpectedHessian(
        matrix=np.sum([entry.matrix for entry in outcomes], axis=0),
        standard_error=np.sqrt(np.sum([entry.matrix_error**2 for entry in outcomes], axis=0)),
        gradient=np.sum([entry.gradient for entry in outcomes], axis=0),
        loss=sum(entry.loss for entry in outcomes),
        loss_error=float(np.sqrt(sum(entry.loss_error**2 for entry in outcomes))),
        how="exact" if all(part[2] == "exact" for part in parts) else "monte_carlo",
        count=max(entry.count for entry in outcomes),
        degrees=min(
            entry.degrees for entry, _, way in parts if way == "monte_carlo" or len({p[2] for p in parts}) == 1
        ),
        quadrature_error=sum(entry.quadrature_error for entry in outcomes),
        ways={name: way for part in parts for name, way in part[1].items()},
        names=names,
        sizes=sizes,
    )


def _how(task: Expectation, how: How, points: int | None, max_points: int, allow_kinks: bool) -> tuple[int, bool]:
    """Points of each Gauss rule to begin with, and whether to be exact."""
    first = FIRST_POINTS if points is None else points
    if how != "auto":
        return first, how == "exact"
    try:
        task.ways(frozenset(), first, allow_kinks)
        return first, task.needed_points(first) <= max_points
    except ProblemError:
        return first, False


def _refined(task: Expectation, points: int, free: bool, max_points: int) -> Outcome:
    """The exact sum; where the points are free, with rules of twice the points until those of twice again change nothing."""
    found = task.exact(points, max_points)
    while free and 2 * points <= MOST_POINTS and task.needed_points(2 * points) <= max_points:
        if found.quadrature_error <= SETTLED * max(1.0, float(np.abs(found.matrix).max(initial=0.0))):
            break
        points = 2 * points
        found = task.exact(points, max_points)
    return found


def _sampled(
    task: Expectation, estimator: Estimator, samples: int, seed: tuple[int, int], allow_kinks: bool
) -> tuple[Outcome, dict[str, str]]:
    """Monte Carlo; under ``auto`` a draw that cannot be pathwise is moved to the score function, one by one."""
    score: frozenset[str] | None = None if estimator == "score" else frozenset()
    while True:
        try:
            ways = task.ways(score, None, allow_kinks)
            return task.monte_carlo(samples, seed, score), ways
        except EstimatorError as reason:
            if score is None or estimator == "pathwise" or reason.draw is None or reason.draw in score:
                raise
            score = score | {reason.draw}


FIRST_POINTS, MOST_POINTS = 8, 64
"""Of each Gauss rule, where the caller names none."""

SETTLED = 1e-10
"""Change of a Hessian's entries from one rule to that of twice the points, relative to the largest, that counts as none."""


def _check(how: Any, estimator: Any, samples: Any, points: Any) -> None:
    if how not in ("auto", "exact", "monte_carlo"):
        raise ConfigError(f"how must be auto, exact or monte_carlo, got {how!r}.")
    if estimator not in ("auto", "pathwise", "score"):
        raise ConfigError(f"estimator must be auto, pathwise or score, got {estimator!r}.")
    if not isinstance(samples, int) or samples < 2:
        raise ConfigError(f"samples must be a whole number of at least 2, got {samples!r}.")
    if points is not None and (not isinstance(points, int) or points < 1):
        raise ConfigError(f"points must be a positive whole number, got {points!r}.")
