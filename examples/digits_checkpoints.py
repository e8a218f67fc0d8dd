"""Trains the network of examples/digits_mlp.py for a few steps and saves checkpoints, for configs/digits_audit.yaml to audit.

Run it: python examples/digits_checkpoints.py runs/digits_checkpoints
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from digits_mlp import digits, one_thread, start, train
from safetensors.torch import save_file
from torch import nn


def save_checkpoints(
    folder: str | Path, *, hidden: int = 16, samples: int = 300, steps: Sequence[int] = (0, 20, 40, 60)
) -> None:
    """Full-batch Adam, a file ``step-NNNN.safetensors`` after each number of steps.

    Args:
        folder: Made if it is not there.
        hidden: Width of both hidden layers.
        samples: How many images, from the first on.
        steps: Ascending; when to save.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    images, labels = digits(samples)
    model = nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 10))
    with one_thread():
        start(model, seed=0)
        for before, step in zip((0, *steps), steps, strict=False):
            train(model, images, labels, step - before)
            save_file(model.state_dict(), Path(folder) / f"step-{step:04d}.safetensors")


if __name__ == "__main__":
    place = sys.argv[1] if len(sys.argv) > 1 else "runs/digits_checkpoints"
    save_checkpoints(place)
    print("saved:", *sorted(path.name for path in Path(place).iterdir()))
