"""The small networks that `paper_check.py` looks at, written as graphs of nodes: 3 to 49 parameters each.

Which nodes a network has matters to the printed formulas (a layer as one node, or its linear map and its activation apart), and
to nothing else.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from disthess.formalism.dag import Dag, DagNode

Function = Callable[..., Tensor]


class Sketch:
    """Collects nodes and random parameters; one generator, so that a network is the same each time."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.nodes: list[DagNode] = []
        self.parameters: dict[str, Tensor] = {}

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random, dtype=torch.float64)

    def parameter(self, name: str, *shape: int) -> str:
        self.parameters[name] = 0.7 * self.draw(*shape)
        return name

    def node(self, name: str, parents: str, parameters: str, function: Function) -> str:
        self.nodes.append(DagNode(name, tuple(parents.split()), tuple(parameters.split()), function))
        return name

    def affine(self, name: str, parent: str, sizes: tuple[int, int], activation: Function | None = None) -> str:
        """``activation(x W^T + b)`` as one node; ``parent`` may be a tensor of inputs' name in ``constants``."""
        self.parameter(f"{name}.W", sizes[1], sizes[0])
        self.parameter(f"{name}.b", sizes[1])
        act = activation or (lambda z: z)
        return self.node(name, parent, f"{name}.W {name}.b", lambda x, w, b: act(x @ w.T + b))

    def first(self, name: str, x: Tensor, size: int, activation: Function | None = None) -> str:
        """The same on the data."""
        self.parameter(f"{name}.W", size, x.shape[1])
        self.parameter(f"{name}.b", size)
        act = activation or (lambda z: z)
        return self.node(name, "", f"{name}.W {name}.b", lambda w, b: act(x @ w.T + b))

    def done(self, loss: Function | None = None) -> Dag:
        return Dag(tuple(self.nodes), self.parameters, loss)

    def mse(self, rows: int, columns: int) -> Function:
        y = self.draw(rows, columns)
        return lambda f: (f - y).square().mean()


def single_node() -> Dag:
    s = Sketch(1)
    x = s.draw(4, 3)
    s.parameter("w", 3)
    s.node("f", "", "w", lambda w: torch.sigmoid(x @ w))
    return s.done(lambda f: f.square().mean() + f.sum().sin())


def star() -> Dag:
    s = Sketch(2)
    x = s.draw(2, 2)
    for name in ("a", "b", "c"):
        s.parameter(f"{name}.W", 2, 2)
        s.node(name, "", f"{name}.W", lambda w: torch.tanh(x @ w.T))
    s.node("join", "a b c", "", lambda a, b, c: torch.sin(a * b + c))
    return s.done(s.mse(2, 2))


def chain_layers() -> Dag:
    s = Sketch(3)
    s.first("l1", s.draw(3, 3), 4, torch.tanh)
    s.affine("l2", "l1", (4, 3), torch.tanh)
    s.affine("l3", "l2", (3, 2), torch.tanh)
    return s.done(s.mse(3, 2))


def chain_split() -> Dag:
    s = Sketch(3)
    s.first("z1", s.draw(3, 3), 4)
    s.node("h1", "z1", "", torch.tanh)
    s.affine("z2", "h1", (4, 3))
    s.node("h2", "z2", "", torch.tanh)
    s.affine("z3", "h2", (3, 2))
    return s.done(s.mse(3, 2))


def one_hidden_split() -> Dag:
    s = Sketch(4)
    s.first("z1", s.draw(3, 3), 4)
    s.node("h1", "z1", "", torch.tanh)
    s.affine("z2", "h1", (4, 2))
    return s.done(s.mse(3, 2))


def _classes(s: Sketch) -> Tensor:
    return torch.eye(3, dtype=torch.float64)[torch.tensor([0, 2, 1, 0])]


def softmax_fused() -> Dag:
    s = Sketch(5)
    s.first("z1", s.draw(4, 3), 4)
    s.node("h1", "z1", "", torch.tanh)
    s.affine("z2", "h1", (4, 3))
    y = _classes(s)
    return s.done(lambda z: -(y * torch.log_softmax(z, dim=1)).sum(1).mean())


def softmax_node() -> Dag:
    s = Sketch(5)
    s.first("z1", s.draw(4, 3), 4)
    s.node("h1", "z1", "", torch.tanh)
    s.affine("z2", "h1", (4, 3))
    s.node("p", "z2", "", lambda z: torch.softmax(z, dim=1))
    y = _classes(s)
    return s.done(lambda p: -(y * p.log()).sum(1).mean())


def residual() -> Dag:
    s = Sketch(6)
    s.first("l1", s.draw(3, 3), 3, torch.tanh)
    s.affine("branch", "l1", (3, 3), torch.tanh)
    s.node("add", "l1 branch", "", lambda a, b: a + b)
    s.affine("out", "add", (3, 2), torch.tanh)
    return s.done(s.mse(3, 2))


def gated() -> Dag:
    s = Sketch(7)
    s.first("l1", s.draw(3, 3), 3, torch.tanh)
    s.affine("gate", "l1", (3, 3), torch.sigmoid)
    s.node("times", "l1 gate", "", lambda a, b: a * b)
    s.affine("out", "times", (3, 2), torch.tanh)
    return s.done(s.mse(3, 2))


def attention() -> Dag:
    s = Sketch(8)
    tokens = s.draw(3, 2)
    s.parameter("E", 2, 2)
    s.node("x", "", "E", lambda e: torch.tanh(tokens @ e))
    for name in ("q", "k", "v"):
        s.parameter(f"{name}.W", 2, 2)
        s.node(name, "x", f"{name}.W", lambda x, w: x @ w.T)
    s.node("attend", "q k v", "", lambda q, k, v: torch.softmax(q @ k.T / 2**0.5, dim=1) @ v)
    return s.done(s.mse(3, 2))


def two_towers() -> Dag:
    s = Sketch(9)
    for tower in ("a", "b"):
        s.first(f"{tower}1", s.draw(2, 2), 2, torch.tanh)
        s.affine(f"{tower}2", f"{tower}1", (2, 2), torch.tanh)
    s.node("join", "a2 b2", "", lambda a, b: (a * b).sum(1, keepdim=True))
    return s.done(s.mse(2, 1))


def recurrent() -> Dag:
    s = Sketch(10)
    x = s.draw(4, 2, 2)
    s.parameter("W", 3, 3)
    s.parameter("U", 3, 2)
    s.parameter("b", 3)
    s.node("h1", "", "U b", lambda u, b: torch.tanh(x[0] @ u.T + b))
    for t in range(1, 4):
        s.node(f"h{t + 1}", f"h{t}", "W U b", lambda h, w, u, b, t=t: torch.tanh(h @ w.T + x[t] @ u.T + b))
    s.affine("out", "h4", (3, 1))
    return s.done(s.mse(2, 1))


def convolutional() -> Dag:
    s = Sketch(11)
    x = s.draw(1, 6)
    s.parameter("c1.W", 2, 3)
    s.parameter("c1.b", 2)
    s.parameter("c2.W", 2, 2, 3)
    s.parameter("c2.b", 2)
    for i in range(4):
        s.node(f"p{i}", "", "c1.W c1.b", lambda w, b, i=i: torch.tanh(x[:, i : i + 3] @ w.T + b))
    for i in range(2):
        s.node(f"q{i}", f"p{i} p{i + 1} p{i + 2}", "c2.W c2.b", _second_layer)
    s.parameter("head.W", 2, 4)
    s.parameter("head.b", 2)
    s.node("out", "q0 q1", "head.W head.b", lambda a, c, w, b: torch.cat([a, c], dim=1) @ w.T + b)
    return s.done(s.mse(1, 2))


def _second_layer(a: Tensor, b: Tensor, c: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.tanh(torch.einsum("nit,oit->no", torch.stack([a, b, c], dim=2), weight) + bias)


def batch_norm() -> Dag:
    s = Sketch(12)
    s.first("z", s.draw(4, 2), 2)
    s.parameter("gamma", 2)
    s.parameter("beta", 2)
    s.node("norm", "z", "gamma beta", _normalise)
    s.affine("out", "norm", (2, 1), torch.tanh)
    return s.done(s.mse(4, 1))


def _normalise(z: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return gamma * (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-3).sqrt() + beta


def variational() -> Dag:
    s = Sketch(13)
    x, noise = s.draw(2, 3), s.draw(2, 2)
    s.first("enc", x, 3, torch.tanh)
    s.affine("mean", "enc", (3, 2))
    s.affine("rho", "enc", (3, 2))
    s.node("sample", "mean rho", "", lambda m, r: m + r.exp() * noise)
    s.affine("dec", "sample", (2, 3), torch.tanh)
    s.affine("back", "dec", (3, 3))
    s.node("elbo", "back mean rho", "", lambda f, m, r: _negative_elbo(f, m, r, x))
    return s.done()


def _negative_elbo(back: Tensor, mean: Tensor, rho: Tensor, x: Tensor) -> Tensor:
    divergence = 0.5 * (mean.square() + (2 * rho).exp() - 1 - 2 * rho)
    return (0.5 * (back - x).square().sum(1) + divergence.sum(1)).mean()


def inner_output() -> Dag:
    s = Sketch(14)
    y, t = s.draw(3, 2), s.draw(3, 4)
    s.first("l1", s.draw(3, 3), 3, torch.tanh)
    s.affine("o1", "l1", (3, 2), torch.tanh)
    s.affine("o2", "o1", (2, 4), torch.tanh)
    s.node("L", "o1 o2", "", lambda a, b: (a - y).square().mean() + (b - t).square().mean())
    return s.done()


def tied_autoencoder() -> Dag:
    s = Sketch(15)
    x = s.draw(2, 3)
    s.parameter("W", 2, 3)
    s.parameter("b", 2)
    s.parameter("c", 3)
    s.node("code", "", "W b", lambda w, b: torch.tanh(x @ w.T + b))
    s.node("back", "code", "W c", lambda h, w, c: h @ w + c)
    return s.done(lambda f: (f - x).square().mean())


def nonlinear_parameters() -> Dag:
    s = Sketch(16)
    x = s.draw(3, 3)
    for name in ("a", "b", "c"):
        s.parameter(name, 3)
    s.node("h", "", "a b", lambda a, b: torch.tanh(a.exp() * x + b.sin() * x.square()))
    s.node("f", "h", "c", lambda h, c: (c.square() * h).sum(1, keepdim=True))
    return s.done(s.mse(3, 1))


ARCHITECTURES: dict[str, Callable[[], Dag]] = {
    "single node": single_node,
    "star (parameters only at a join)": star,
    "chain MLP tanh, node = layer": chain_layers,
    "chain MLP tanh, linear | tanh split": chain_split,
    "one hidden layer, split": one_hidden_split,
    "softmax-CE fused": softmax_fused,
    "softmax node + log-CE": softmax_node,
    "residual (additive) skip": residual,
    "gated (multiplicative) skip": gated,
    "attention q, k, v": attention,
    "two towers + bilinear join": two_towers,
    "RNN T=4, shared W": recurrent,
    "convolution x 2, shared kernels": convolutional,
    "BatchNorm in training, stacked": batch_norm,
    "VAE -ELBO, reparametrised": variational,
    "output also inner node": inner_output,
    "tied autoencoder W, W^T": tied_autoencoder,
    "nonlinear in theta": nonlinear_parameters,
}
