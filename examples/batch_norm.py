"""Batch norm in training: every sample's output depends on all samples, and the curvature shows it.

The Hessian is that of the training-mode loss, mean and variance taken as the functions of the batch that they are. Treating them
as constants, as evaluation mode does, is another function with another Hessian. Running statistics are left as they were.

Run it: python examples/batch_norm.py
"""

from __future__ import annotations

import tempfile

import numpy as np
import torch
from torch import nn

import disthess


def problem(samples: int = 12, training: bool = True, seed: int = 0) -> disthess.Problem:
    """Classify noise by a net with one batch norm."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).train(training)
    return disthess.Problem(
        model, loss="cross_entropy", batches=[(torch.randn(samples, 4), torch.randint(0, 3, (samples,)))]
    )


def main() -> None:
    """Compare both modes, and show that samples are coupled in one."""
    with tempfile.TemporaryDirectory() as folder:
        train = disthess.compute(problem(), f"{folder}/train.zarr", dtype="float64", activations="0", progress=False)
        frozen = disthess.compute(problem(training=False), f"{folder}/eval.zarr", dtype="float64", progress=False)
        difference = np.linalg.norm(train.dense() - frozen.dense()) / np.linalg.norm(train.dense())
        print(train.attributes["independence"])
        print(f"training against evaluation mode: the Hessians differ by {difference:.0%}")
        block = train.activation_block("0", "0").reshape(12, 6, 12, 6)
        across = np.linalg.norm(block - np.einsum("ninj->nij", block)[:, :, None, :] * np.eye(12)[:, None, :, None])
        print(f"share of H^f between different samples: {across / np.linalg.norm(block):.0%}")


if __name__ == "__main__":
    main()
