"""Modules of the cases that stand for an architecture each, as small as they can be."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ReluCnn(nn.Module):
    """Convolution, ReLU, max-pool, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.head = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(torch.relu(self.c1(x)), 2)
        return self.head(F.max_pool2d(torch.relu(self.c2(h)), 2).flatten(1))


class Normed(nn.Module):
    """One norm between two layers; the norm sees ``[N, 4, 2]``."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(3, 8), norm, nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x).reshape(-1, 4, 2)
        return self.fc2(torch.tanh(self.norm(h)).flatten(1))


class BatchNormConv(nn.Module):
    """Batch norm over images, with a residual connection around it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return self.head(torch.tanh(h + self.norm(h)).mean((2, 3)))


class Residual(nn.Module):
    """Two pre-activation residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for block in self.blocks:
            h = h + block(F.silu(h))
        return self.last(h)


class Recurrent(nn.Module):
    """torch's own RNN or GRU, all outputs used."""

    def __init__(self, cell: nn.Module, width: int) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0].mean(1))


class CellLoop(nn.Module):
    """A cell called in a loop over time."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        state: Tensor | tuple[Tensor, Tensor] | None = None
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Vae(nn.Module):
    """Reparametrised with noise from the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.mean, self.rho = nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(3, 2)
        self.decode, self.back = nn.Linear(2, 3), nn.Linear(3, 4)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = torch.tanh(self.encode(x))
        mean, rho = self.mean(h), self.rho(h)
        return self.back(torch.tanh(self.decode(mean + rho.exp() * noise))), mean, rho


def negative_elbo(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Bernoulli likelihood of a Gaussian latent, one sample of it."""
    logits, mean, rho = model(batch["x"], batch["noise"])
    likelihood = F.binary_cross_entropy_with_logits(logits, batch["x"], reduction="none").sum(1)
    divergence = 0.5 * (mean.square() + (2 * rho).exp() - 1 - 2 * rho).sum(1)
    return (likelihood + divergence).mean()


class Mixture(nn.Module):
    """Experts weighed by a softmax gate over all of them, or over the best two."""

    def __init__(self, best: int | None) -> None:
        super().__init__()
        self.gate, self.experts, self.best = nn.Linear(3, 3), nn.ModuleList([nn.Linear(3, 2) for _ in range(3)]), best

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x)
        if self.best is not None:
            values, places = scores.topk(self.best, dim=-1)
            scores = torch.full_like(scores, -math.inf).scatter(-1, places, values)
        answers = torch.stack([torch.tanh(expert(x)) for expert in self.experts], dim=1)
        return (scores.softmax(-1).unsqueeze(-1) * answers).sum(1)


class UNet(nn.Module):
    """Down, up by a transposed convolution, and across."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
        self.up, self.out = nn.ConvTranspose2d(2, 2, 2, stride=2), nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        across = torch.tanh(self.down(x))
        h = F.gelu(self.middle(F.avg_pool2d(across, 2)))
        return self.out(torch.cat([self.up(h), across], dim=1))


class MultiHead(nn.Module):
    """torch's own attention: one matrix holds q, k and v."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.head(self.attend(x, x, x, attn_mask=mask, need_weights=False)[0].mean(1))


class GroupedQuery(nn.Module):
    """Two query heads share one key and value head; rotary positions, RMS norm, gated feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.kv, self.o = nn.RMSNorm(4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.gate, self.up, self.down = (nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False), nn.Linear(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        h = self.norm(x)
        q = _rotate(self.q(h).reshape(n, t, 2, 2)).transpose(1, 2)
        k, v = self.kv(h).reshape(n, t, 2, 2).unbind(2)
        k, v = _rotate(k.unsqueeze(2)).transpose(1, 2), v.unsqueeze(1)
        mixed = F.scaled_dot_product_attention(q, k.expand(-1, 2, -1, -1), v.expand(-1, 2, -1, -1), is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(n, t, 4))
        return (x + self.down(F.silu(self.gate(x)) * self.up(x))).sum((1, 2)).unsqueeze(-1)


def _rotate(x: Tensor) -> Tensor:
    angle = torch.arange(x.shape[1], dtype=x.dtype).reshape(1, -1, 1, 1) * 0.7
    return torch.cat(
        [x[..., :1] * angle.cos() - x[..., 1:] * angle.sin(), x[..., :1] * angle.sin() + x[..., 1:] * angle.cos()], -1
    )


class PatchTransformer(nn.Module):
    """Patches by a strided convolution, a class token, positions, one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(1, 4, 2, stride=2), nn.Parameter(0.2 * torch.randn(1, 1, 4))
        self.place, self.head = nn.Parameter(0.2 * torch.randn(1, 5, 4)), nn.Linear(4, 2)
        self.layer = nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(x.shape[0], -1, -1), patches], dim=1) + self.place
        return self.head(self.layer(h)[:, 0])
