"""A recurrent net unrolled over T steps: T x T blocks of one weight, one for each pair of time steps.

Their sum is the weight's block of the Hessian; each shows how much two moments have to do with each other.

Run it: python examples/unrolled_rnn.py
"""

from __future__ import annotations

import tempfile

import numpy as np
import torch
from torch import Tensor, nn

import disthess


class Elman(nn.Module):
    """``h = tanh(W h + U x)``, a linear layer on the last state."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.recur = nn.Linear(3, width), nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        """``[N, T, 3]`` to ``[N, 2]``."""
        state = torch.tanh(self.inner(inputs[:, 0]))
        for step in range(1, inputs.shape[1]):
            state = torch.tanh(self.recur(state) + self.inner(inputs[:, step]))
        return self.head(state)


def problem(steps: int = 6, width: int = 5, samples: int = 30, seed: int = 0) -> disthess.Problem:
    """Say whether a random walk ended above zero."""
    torch.manual_seed(seed)
    walks = torch.randn(samples, steps, 3).cumsum(1)
    return disthess.Problem(Elman(width), loss="cross_entropy", batches=[(walks, (walks[:, -1, 0] > 0).long())])


def main() -> None:
    """Print the norms of the blocks of the recurrent weight by pairs of steps."""
    with tempfile.TemporaryDirectory() as folder:
        store = disthess.compute(problem(), f"{folder}/rnn.zarr", shared="uses", dtype="float64", progress=False)
        uses = next(parameter.uses for parameter in store.parameters if parameter.name == "recur.weight")
        blocks = [[store.use_block(a, b) for b in uses] for a in uses]
        print("norm of the block of steps i, j:")
        for row in blocks:
            print("  " + "  ".join(f"{np.linalg.norm(block):.4f}" for block in row))
        whole = store.block("recur.weight", "recur.weight")
        total = sum(block for row in blocks for block in row)
        print(f"their sum is the block of the weight to {np.abs(total - whole).max():.0e}")


if __name__ == "__main__":
    main()
