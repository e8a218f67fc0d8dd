"""Attention: q, k and v are rows of one matrix, and blocks of their own when they are named.

Run it: python examples/attention.py
"""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor, nn

import disthess


class Attend(nn.Module):
    """One layer of torch's attention, a linear layer on the mean of its outputs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(width, 2, batch_first=True), nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[N, T, width]`` to ``[N, 2]``."""
        return self.head(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))


def problem(width: int = 8, samples: int = 16, seed: int = 0) -> disthess.Problem:
    """Classify random sequences of five tokens."""
    torch.manual_seed(seed)
    batch = (torch.randn(samples, 5, width), torch.randint(0, 2, (samples,)))
    return disthess.Problem(Attend(width), loss="cross_entropy", batches=[batch])


def main() -> None:
    """Print norm, coupling and gap to Gauss-Newton of the blocks between q, k, v and the output projection."""
    task = problem()
    sections = disthess.attention_sections(task.model)
    with tempfile.TemporaryDirectory() as folder:
        store = disthess.compute(
            task,
            f"{folder}/attention.zarr",
            parts=("hessian", "ggn"),
            sections=sections,
            dtype="float64",
            progress=False,
        )
        for row in store.pairs(of="sections").rows:
            if row.a.endswith("weight") and row.b.endswith("weight"):
                print(
                    f"{row.a:<26} {row.b:<26} norm {row.norm:.2e}  coupling {row.coupling:5.2f}  GN-gap {row.gap:.2g}"
                )


if __name__ == "__main__":
    main()
