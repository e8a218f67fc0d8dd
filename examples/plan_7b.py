"""Plan the Hessian of chosen parameters of a model of seven billion on 256 GPUs, with neither the weights nor the GPUs.

The model is built on torch's meta device: shapes and no values, so that it takes no memory. Token indices are given as data; a
batch of meta tensors works as well. What needs values (whether samples really are independent, kinks, the certificate) is left
to a run, and the plan says so; ``disthess.compute`` refuses such a problem.

Run it: python examples/plan_7b.py, or disthess plan configs/plan_7b.yaml
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import disthess


class Attention(nn.Module):
    """Causal self-attention without biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, D]`` to ``[N, T, D]``."""
        apart = (*x.shape[:2], self.heads, -1)
        q, k, v = (layer(x).view(apart).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(x.shape))


class Layer(nn.Module):
    """Attention and a gated feed-forward net, each on a normalised residual stream."""

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.input_norm, self.attention = nn.RMSNorm(width), Attention(width, heads)
        self.inner_norm = nn.RMSNorm(width)
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, D]`` to ``[N, T, D]``."""
        x = x + self.attention(self.input_norm(x))
        h = self.inner_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    """A decoder of Llama's shape; rotary positions are left out, which have no parameters."""

    def __init__(self, width: int, inner: int, heads: int, layers: int, words: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.layers = nn.ModuleList(Layer(width, inner, heads) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, words, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[N, T]`` to logits ``[N, words, T]``."""
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)).transpose(1, 2)


def problem(
    width: int = 4096,
    inner: int = 11008,
    heads: int = 32,
    layers: int = 32,
    words: int = 32000,
    samples: int = 2,
    tokens: int = 64,
    device: str = "meta",
) -> disthess.Problem:
    """Next-token loss on random tokens; the sizes are those of Llama 7B. On ``device="cpu"`` there are weights, too."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Decoder(width, inner, heads, layers, words)
    text = torch.randint(words, (samples, tokens + 1))
    return disthess.Problem(model, loss="cross_entropy", batches=[(text[:, :-1], text[:, 1:])])


def main() -> None:
    """Print the plan of all norms: 266,240 parameters, every pair of them."""
    plan = disthess.plan(problem(), parameters="*norm*", executor="ray", workers=256, device="cuda")
    print(plan.describe(flops_per_second=40e12, rate="as H100s sustain in float32 products, say"))


if __name__ == "__main__":
    main()
