"""Variants of the problems: fewer samples, and MLPs of any depth."""

from __future__ import annotations

from problems import PROBLEMS, digits_mlp
from torch import nn

import disthess

WIDTH = 32
STEPS = 50


def build(name: str, scale: float = 1.0, samples: int | None = None) -> disthess.Problem:
    """A problem of the suite.

    Args:
        name: One of ``PROBLEMS``.
        scale: Factor of its widths.
        samples: Its first so many samples; None for all.
    """
    return first_samples(PROBLEMS[name](scale), samples)


def first_samples(problem: disthess.Problem, samples: int | None) -> disthess.Problem:
    """The same model and mean cross-entropy on the first samples of the batch alone; None for the problem itself."""
    if samples is None:
        return problem
    inputs, targets = problem.batches[0]
    return disthess.Problem(problem.model, loss="cross_entropy", batches=[(inputs[:samples], targets[:samples])])


def deep_mlp(depth: int, width: int = WIDTH, samples: int | None = None) -> disthess.Problem:
    """Digits through ``depth`` hidden tanh layers of one width, trained a little; ``P ~ 64 d + depth d^2``."""
    images, labels = digits_mlp.digits(1797)
    layers: list[nn.Module] = [nn.Linear(64, width), nn.Tanh()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(width, 10))
    with digits_mlp.one_thread():
        digits_mlp.start(model, 0)
        digits_mlp.train(model, images, labels, STEPS)
    whole = disthess.Problem(model, loss="cross_entropy", batches=[(images, labels)])
    return first_samples(whole, samples)
