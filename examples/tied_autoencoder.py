"""An autoencoder whose decoder is the transposed encoder: one weight, used twice.

The block of a shared weight is the sum over all pairs of its uses; ``shared="uses"`` keeps the summands in the store.

Run it: python examples/tied_autoencoder.py
"""

from __future__ import annotations

import tempfile

import numpy as np
import torch
from torch import Tensor, nn

import disthess


class TiedAutoencoder(nn.Module):
    """``x -> tanh(x W^T + a) W + b``, with one ``W`` of shape ``[code, width]``."""

    def __init__(self, width: int, code: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(code, width) / width**0.5)
        self.hidden_bias = nn.Parameter(torch.zeros(code))
        self.output_bias = nn.Parameter(torch.zeros(width))

    def forward(self, inputs: Tensor) -> Tensor:
        """Reconstruct ``[N, width]``."""
        code = torch.tanh(nn.functional.linear(inputs, self.weight, self.hidden_bias))
        return nn.functional.linear(code, self.weight.T, self.output_bias)


def problem(width: int = 12, code: int = 4, samples: int = 50, seed: int = 0) -> disthess.Problem:
    """Mean squared reconstruction error of points near a plane."""
    torch.manual_seed(seed)
    model = TiedAutoencoder(width, code)
    points = torch.randn(samples, 2) @ torch.randn(2, width) + 0.1 * torch.randn(samples, width)
    return disthess.Problem(model, loss="mse", batches=[(points, points)])


def main() -> None:
    """Compute the Hessian by both ways of treating the shared weight and print how well they agree."""
    with tempfile.TemporaryDirectory() as folder:
        by_use = disthess.compute(problem(), f"{folder}/uses.zarr", shared="uses", dtype="float64", progress=False)
        summed = disthess.compute(problem(), f"{folder}/sum.zarr", shared="sum", dtype="float64", progress=False)
        one, other = by_use.block("weight", "weight"), summed.block("weight", "weight")
        print(f"shared block {one.shape}, difference {np.abs(one - other).max() / np.abs(one).max():.1e} relative")


if __name__ == "__main__":
    main()
