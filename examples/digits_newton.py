"""Newton's method on handwritten digits: from far away by trusted steps, then plain ones, whose gradients are squared each time.

A minimum where the Hessian is positive definite needs the weight decay: without it, rescalings and shifts of logits leave flat
directions, and no Newton method is quadratic along those.

Run it: python examples/digits_newton.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

import disthess


def problem(hidden: int = 6, samples: int = 300, decay: float = 0.01, seed: int = 0) -> disthess.Problem:
    """An MLP 64-hidden-10 with tanh on the first images, in float64, not trained.

    Args:
        hidden: Width.
        samples: How many images.
        decay: Weight decay, ``decay / 2 |theta|^2``.
        seed: Of the random start.
    """
    data = load_digits()
    images = torch.tensor(data.data[:samples] / 16.0, dtype=torch.float64)
    labels = torch.tensor(data.target[:samples], dtype=torch.int64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 10)).double()
    return disthess.Problem(model, loss="cross_entropy", batches=[(images, labels)], weight_decay=decay)


def main() -> None:
    """Find a minimum, step a little away from it, and come back."""
    start = problem()
    found = disthess.newton(start, kind="trust", max_steps=100, gradient_tolerance=1e-12)
    accepted = sum(step.accepted for step in found.steps)
    print(f"trusted steps: {accepted} taken, {len(found.steps) - accepted} taken back; {found.reason}")
    print(f"loss {found.loss:.10f}, smallest eigenvalue {found.stopping.smallest_eigenvalue:.3e}\n")

    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in start.model.named_parameters():
            shift = torch.randn(tensor.shape, generator=noise, dtype=torch.float64)
            tensor.copy_(found.parameters[name] + 0.02 * shift)
    near = disthess.newton(start, kind="plain", max_steps=12, gradient_tolerance=1e-15)
    print("plain steps from nearby:\n        |g|      |g| / |g before|^2")
    before = None
    for step in near.steps:
        print(f"  {step.gradient_norm:.3e}" + ("" if before is None else f"   {step.gradient_norm / before**2:9.3g}"))
        before = step.gradient_norm
    print("the right column stays bounded (until |g| is rounding): convergence is quadratic")


if __name__ == "__main__":
    main()
