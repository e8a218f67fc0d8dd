"""A small U-net: down, up by a transposed convolution, and a skip across. What does the skip do to curvature?

Run it: python examples/unet.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import disthess


class UNet(nn.Module):
    """One level."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.middle = nn.Conv2d(1, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)
        self.up, self.out = nn.ConvTranspose2d(channels, channels, 2, stride=2), nn.Conv2d(2 * channels, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """``[N, 1, H, W]`` to the same."""
        across = torch.tanh(self.down(images))
        low = torch.tanh(self.middle(nn.functional.avg_pool2d(across, 2)))
        return self.out(torch.cat([self.up(low), across], dim=1))


def problem(channels: int = 2, samples: int = 4, seed: int = 0) -> disthess.Problem:
    """Remove noise from small images."""
    torch.manual_seed(seed)
    clean = torch.nn.functional.avg_pool2d(torch.randn(samples, 1, 16, 16), 2)
    return disthess.Problem(UNet(channels), loss="mse", batches=[(clean + 0.3 * torch.randn_like(clean), clean)])


def main() -> None:
    """Print how much of the residual, Hessian minus Gauss-Newton, each operation contributes."""
    found = disthess.node_curvature(problem(), dtype="float64")
    for row in sorted(found.rows, key=lambda row: -abs(row.share)):
        print(f"{row.name:<10} {row.op:<32} norm {row.norm:.2e}   share {row.share:7.2%}")
    print(f"shares add up to {sum(row.share for row in found.rows):.12f}")


if __name__ == "__main__":
    main()
