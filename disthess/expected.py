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
    Expectation,
    ExpectedHessian,
    How,
    Outcome,
    PathwiseKink,
    RandomObjective,
    Stage,
)


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
    points: int = 8,
    max_points: int = 4096,
    allow_kinks: bool = False,
    parameters: str | Sequence[str] | None = None,
) -> ExpectedHessian:
    """The Hessian of ``sum_b E[loss_b]``, in float64, where the objective draws random values.

    ``objective(model, batch, draw)`` asks ``draw("z", distribution)`` for each random value, with any distribution of
    ``torch.distributions``, and returns the loss: a tensor (entries are added up), or a list of costs ``(tensor, names of the
    draws it depends on)``, which lowers the variance of the score function. A cost with one entry for each row of its draws is
    treated row by row.

    Args:
        model: A module.
        objective: To be minimised (an ELBO or a reward with its sign changed); with ``marginal`` it is ``log p(y | z)``.
        batches: Each passed to the objective.
        how: ``exact`` sums over finite supports and Gauss rules, ``monte_carlo`` draws; ``auto`` is exact where that is possible
            within ``max_points``.
        estimator: Of Monte Carlo. ``pathwise`` differentiates through reparametrised draws, the noise held fixed; ``score``
            uses log-probabilities (DiCE) for all draws; ``auto`` is pathwise where a draw can be reparametrised and no kink lies
            between it and the loss.
        marginal: The loss is ``-log E exp(objective)``, a marginal likelihood; by Louis's identity.
        samples: Of Monte Carlo.
        seed: Of Monte Carlo: the same seed, the same noise, whatever the parameters.
        points: Of each Gauss rule.
        max_points: More are refused.
        allow_kinks: Differentiate pathwise through kinks all the same.
        parameters: Globs; default all trainable ones.

    Returns:
        The matrix with the standard error of every entry: see `ExpectedHessian`.

    Raises:
        ConfigError: An argument is wrong.
        ProblemError: A draw has no exact rule, there are too many points, or a kink forbids the pathwise estimator.

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
        way = _how(task, how, points, max_points, allow_kinks)
        if way == "exact":
            ways = task.ways(frozenset(), points, allow_kinks)
            parts.append((task.exact(points, max_points), ways, way))
        else:
            score = _score(task, estimator, allow_kinks)
            ways = task.ways(score, None, allow_kinks)
            parts.append((task.monte_carlo(samples, seed + 7_368_787 * number, score), ways, way))
    outcomes = [part[0] for part in parts]
    return ExpectedHessian(
        matrix=np.sum([entry.matrix for entry in outcomes], axis=0),
        standard_error=np.sqrt(np.sum([entry.matrix_error**2 for entry in outcomes], axis=0)),
        gradient=np.sum([entry.gradient for entry in outcomes], axis=0),
        loss=sum(entry.loss for entry in outcomes),
        loss_error=float(np.sqrt(sum(entry.loss_error**2 for entry in outcomes))),
        how="exact" if all(part[2] == "exact" for part in parts) else "monte_carlo",
        count=max(entry.count for entry in outcomes),
        quadrature_error=sum(entry.quadrature_error for entry in outcomes),
        ways={name: way for part in parts for name, way in part[1].items()},
        names=names,
        sizes=sizes,
    )


def _how(task: Expectation, how: How, points: int, max_points: int, allow_kinks: bool) -> str:
    if how != "auto":
        return how
    try:
        task.ways(frozenset(), points, allow_kinks)
        return "exact" if task.needed_points(points) <= max_points else "monte_carlo"
    except ProblemError:
        return "monte_carlo"


def _score(task: Expectation, estimator: Estimator, allow_kinks: bool) -> frozenset[str]:
    """Names of the draws for the score function; kinks move a draw there one by one under ``auto``."""
    chosen: frozenset[str] = frozenset()
    if estimator == "score":
        return frozenset(task.ways(chosen, None, allow_kinks=True))
    while True:
        try:
            task.ways(chosen, None, allow_kinks)
            return chosen
        except PathwiseKink as kink:
            if estimator == "pathwise":
                raise
            chosen = chosen | {kink.draw}


def _check(how: Any, estimator: Any, samples: Any, points: Any) -> None:
    if how not in ("auto", "exact", "monte_carlo"):
        raise ConfigError(f"how must be auto, exact or monte_carlo, got {how!r}.")
    if estimator not in ("auto", "pathwise", "score"):
        raise ConfigError(f"estimator must be auto, pathwise or score, got {estimator!r}.")
    if not isinstance(samples, int) or samples < 2:
        raise ConfigError(f"samples must be a whole number of at least 2, got {samples!r}.")
    if not isinstance(points, int) or points < 1:
        raise ConfigError(f"points must be a positive whole number, got {points!r}.")
