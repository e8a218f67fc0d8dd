"""A mixture of experts, the best two of four for each sample: which experts share curvature?

Run it: python examples/mixture_of_experts.py
"""

from __future__ import annotations

import math
import tempfile

import torch
from torch import Tensor, nn

import disthess


class Mixture(nn.Module):
    """Experts weighed by a softmax over the best two gate scores."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(3, experts)
        self.experts = nn.ModuleList(
            [nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 1)) for _ in range(experts)]
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """``[N, 3]`` to ``[N, 1]``."""
        best, places = self.gate(inputs).topk(2, dim=-1)
        scores = torch.full((len(inputs), len(self.experts)), -math.inf, dtype=inputs.dtype).scatter(-1, places, best)
        answers = torch.stack([expert(inputs) for expert in self.experts], dim=1)
        return (scores.softmax(-1).unsqueeze(-1) * answers).sum(1)


def problem(experts: int = 4, samples: int = 60, seed: int = 0) -> disthess.Problem:
    """A regression."""
    torch.manual_seed(seed)
    inputs = torch.randn(samples, 3)
    return disthess.Problem(Mixture(experts), loss="mse", batches=[(inputs, inputs.prod(1, keepdim=True))])


def main() -> None:
    """Print the coupling between the experts' last weights."""
    with tempfile.TemporaryDirectory() as folder:
        store = disthess.compute(problem(), f"{folder}/mixture.zarr", dtype="float64", progress=False)
        table = store.pairs()
        last = [place for place, name in enumerate(table.names) if name.endswith(".2.weight")]
        for row in table.matrix("coupling")[last][:, last]:
            print("  ".join(f"{value:.2f}" for value in row))


if __name__ == "__main__":
    main()
