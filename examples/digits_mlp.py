"""An MLP 64-64-64-10 with tanh on scikit-learn's 1,797 images of handwritten digits: 8,970 parameters.

Run it: disthess run configs/digits_mlp.yaml
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import disthess


def problem(hidden: int = 64, steps: int = 300, samples: int = 1797, seed: int = 0) -> disthess.Problem:
    """Train the network and ask for the Hessian of its mean cross-entropy over the images.

    Args:
        hidden: Width of both hidden layers.
        steps: Full-batch Adam steps; 0 leaves the random start.
        samples: How many images, from the first on.
        seed: Of the random start.
    """
    images, labels = digits(samples)
    model = nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 10))
    with one_thread():
        start(model, seed)
        train(model, images, labels, steps)
    return disthess.Problem(model, loss="cross_entropy", batches=[(images, labels)])


def digits(samples: int) -> tuple[Tensor, Tensor]:
    """Images ``[samples, 64]`` scaled to [0, 1], and labels ``[samples]``."""
    data = load_digits()
    images = torch.tensor(data.data[:samples] / 16.0, dtype=torch.float32)
    return images, torch.tensor(data.target[:samples], dtype=torch.int64)


def start(model: nn.Module, seed: int) -> None:
    """Random weights of variance ``1 / fan_in`` and zero biases, the same whatever else drew random numbers before."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.zero_()
            else:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> None:
    """Full-batch Adam on the mean cross-entropy."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    for parameter in model.parameters():
        parameter.grad = None


@contextmanager
def one_thread() -> Iterator[None]:
    """Train on one thread: the weights, and so the problem, are then the same bits for any number of threads later."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
