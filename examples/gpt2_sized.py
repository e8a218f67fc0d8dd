"""A decoder of GPT-2's shape: 124 million parameters with random weights, the head tied to the embedding, on random tokens.

Its Hessian has 1.5e16 entries; a product with it takes seconds. Nothing is downloaded: the shape is what costs. On such an
operator every function takes few products: for a model of this size that is what a computation is measured in.

Run it: python examples/gpt2_sized.py
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import disthess


class Block(nn.Module):
    """Causal attention and a feed-forward net, each on a normalised residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, D]`` to ``[N, T, D]``."""
        apart = (*x.shape[:2], self.heads, -1)
        q, k, v = (part.view(apart).transpose(1, 2) for part in self.qkv(self.norm_1(x)).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class Decoder(nn.Module):
    """Tokens ``[N, T]`` to logits ``[N, words, T]``."""

    def __init__(self, width: int, heads: int, layers: int, words: int, positions: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # As GPT-2 begins: the layers that write to the residual stream are smaller.
                shrunk = (2 * layers) ** -0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(parameter, std=0.02 * shrunk)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """``[N, T]`` to ``[N, words, T]``."""
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).transpose(1, 2)


def problem(
    width: int = 768,
    heads: int = 12,
    layers: int = 12,
    words: int = 50257,
    positions: int = 1024,
    samples: int = 1,
    tokens: int = 16,
    batches: int = 2,
    seed: int = 0,
) -> disthess.Problem:
    """Next-token loss; the sizes are those of the smallest GPT-2, the batches are small."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Decoder(width, heads, layers, words, positions)
        drawn = [torch.randint(0, words, (samples, tokens + 1)) for _ in range(batches)]
    data = [(text[:, :-1], text[:, 1:]) for text in drawn]
    return disthess.Problem(model, loss="cross_entropy", batches=data)


def main() -> None:
    """Print what an operator on it needs, and how long a product takes."""
    with disthess.operator(problem(), executor="serial") as hessian:
        print(hessian.describe())
        vector = np.random.default_rng(0).standard_normal((hessian.size, 1))
        begin = time.perf_counter()
        image = hessian.matmat(vector)
        print(
            f"|H v| / |v| = {np.linalg.norm(image) / np.linalg.norm(vector):.4g}, first product with its tapes ", end=""
        )
        print(f"{time.perf_counter() - begin:.1f} s")
        begin = time.perf_counter()
        hessian.matmat(vector)
        print(f"every other product {time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    main()
