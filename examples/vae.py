"""A variational autoencoder: the Hessian of the negative evidence bound, reparametrised.

The noise is drawn once and travels in the batch, so that the objective is a function; what is computed is the exact Hessian of that
sample average.

Run it: python examples/vae.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping

import torch
from torch import Tensor, nn

import disthess


class Vae(nn.Module):
    """Gaussian code, Gaussian likelihood."""

    def __init__(self, width: int, code: int) -> None:
        super().__init__()
        self.encoder, self.mean, self.log_scale = nn.Linear(width, 8), nn.Linear(8, code), nn.Linear(8, code)
        self.decoder = nn.Sequential(nn.Linear(code, 8), nn.Tanh(), nn.Linear(8, width))

    def forward(self, inputs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction, mean and logarithm of the scale."""
        hidden = torch.tanh(self.encoder(inputs))
        mean, log_scale = self.mean(hidden), self.log_scale(hidden)
        return self.decoder(mean + log_scale.exp() * noise), mean, log_scale


def negative_elbo(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """``-log p(x | z) + KL(q(z | x) || N(0, 1))``, mean over samples."""
    back, mean, log_scale = model(batch["inputs"], batch["noise"])
    error = 0.5 * (back - batch["inputs"]).square().sum(1)
    divergence = 0.5 * (mean.square() + (2 * log_scale).exp() - 1 - 2 * log_scale).sum(1)
    return (error + divergence).mean()


def problem(width: int = 6, code: int = 2, samples: int = 40, seed: int = 0) -> disthess.Problem:
    """Points near a plane."""
    torch.manual_seed(seed)
    points = torch.randn(samples, 2) @ torch.randn(2, width)
    batch = {"inputs": points, "noise": torch.randn(samples, code)}
    return disthess.Problem(Vae(width, code), objective=negative_elbo, batches=[batch])


def main() -> None:
    """Print how strongly encoder and decoder are coupled."""
    with tempfile.TemporaryDirectory() as folder:
        store = disthess.compute(problem(), f"{folder}/vae.zarr", dtype="float64", progress=False)
        for row in store.pairs().largest(5, "coupling"):
            print(f"{row.a:<18} {row.b:<18} coupling {row.coupling:.3f}")


if __name__ == "__main__":
    main()
