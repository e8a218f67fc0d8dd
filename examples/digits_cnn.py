"""A small convolutional network on 8 x 8 images of digits: strides, group norm, average pooling.

Run it: python examples/digits_cnn.py
"""

from __future__ import annotations

import tempfile

import torch
from sklearn.datasets import load_digits
from torch import nn

import disthess


def problem(channels: int = 4, samples: int = 100, seed: int = 0) -> disthess.Problem:
    """Mean cross-entropy of the untrained network on the first images."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
        nn.GroupNorm(2, 2 * channels),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * channels, 10),
    )
    data = load_digits()
    images = torch.tensor(data.images[:samples] / 16.0, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(data.target[:samples], dtype=torch.int64)
    return disthess.Problem(model, loss="cross_entropy", batches=[(images, labels)])


def main() -> None:
    """Compute both the Hessian and its Gauss-Newton part, and print how far apart they are per layer."""
    with tempfile.TemporaryDirectory() as folder:
        store = disthess.compute(problem(), f"{folder}/cnn.zarr", parts=("hessian", "ggn"), progress=False)
        full, residual = store.blocks("hessian").matrix(), store.blocks("residual").matrix()
        for index, parameter in enumerate(store.parameters):
            share = residual[index, index] / max(full[index, index], 1e-30)
            print(f"{parameter.name:12s} ||residual|| / ||hessian|| = {share:.3f}")


if __name__ == "__main__":
    main()
