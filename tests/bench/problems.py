"""The problems of the benchmarks: an MLP, a CNN, an RNN and a GPT, each small enough for a dense Hessian.

Each is a `disthess.Problem` with one batch ``(inputs, targets)`` and a mean cross-entropy, so that a peer that knows nothing
of disthess takes the same model, the same tensors and the same loss.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

import disthess

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import digits_mlp

SAMPLES = 512


def mlp(scale: float = 1.0) -> disthess.Problem:
    """Digits, 64-64-64-10, tanh, all 1,797 samples: P = 8,970."""
    return digits_mlp.problem(hidden=int(64 * scale), steps=50)


def cnn(scale: float = 1.0) -> disthess.Problem:
    """Digits as 8 x 8 images, conv(1, 8)-pool-conv(8, 16)-pool-linear, ReLU, 512 samples: P = 1,898."""
    first, second = int(8 * scale), int(16 * scale)
    images, labels = digits_mlp.digits(SAMPLES)
    model = nn.Sequential(
        nn.Conv2d(1, first, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(first, second, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(second * 4, 10),
    )
    return _digits(model, images.reshape(-1, 1, 8, 8), labels)


class Elman(nn.Module):
    """An unrolled Elman network, one weight used at every step."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.enter = nn.Linear(inputs, hidden)
        self.again = nn.Linear(hidden, hidden, bias=False)
        self.leave = nn.Linear(hidden, 10)

    def forward(self, rows: Tensor) -> Tensor:
        """``[N, steps, inputs]`` to ``[N, 10]``."""
        state = torch.tanh(self.enter(rows[:, 0]))
        for step in range(1, rows.shape[1]):
            state = torch.tanh(self.enter(rows[:, step]) + self.again(state))
        return self.leave(state)


def rnn(scale: float = 1.0) -> disthess.Problem:
    """Digits row by row, an Elman network of 8 steps of 8, hidden 48, 512 samples, shared weights: P = 3,226."""
    images, labels = digits_mlp.digits(SAMPLES)
    return _digits(Elman(8, int(48 * scale)), images.reshape(-1, 8, 8), labels)


class Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, width]`` to the same."""
        samples, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(samples, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(samples, tokens, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    """A decoder of two blocks that predicts the next token."""

    def __init__(self, width: int, tokens: int, vocabulary: int, layers: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(vocabulary, width), nn.Embedding(tokens, width)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[N, T]`` to ``[N, vocabulary, T]``."""
        x = self.token(tokens) + self.place(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).transpose(1, 2)


def gpt(scale: float = 1.0) -> disthess.Problem:
    """Two layers, width 32, four heads, 16 tokens, vocabulary 64, batch 32: P = 30,080."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, 64, (32, 17), generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Gpt(int(32 * scale), 16, 64, 2)
    return _trained(model, text[:, :-1], text[:, 1:])


def _digits(model: nn.Module, images: Tensor, labels: Tensor) -> disthess.Problem:
    """Random weights of variance 1 / fan_in, as the example has them, then some training."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return _trained(model, images, labels)


def _trained(model: nn.Module, inputs: Tensor, targets: Tensor) -> disthess.Problem:
    with digits_mlp.one_thread():
        digits_mlp.train(model, inputs, targets, 50)
    return disthess.Problem(model, loss="cross_entropy", batches=[(inputs, targets)])


PROBLEMS: Mapping[str, Callable[[], disthess.Problem]] = {"mlp": mlp, "cnn": cnn, "rnn": rnn, "gpt": gpt}
