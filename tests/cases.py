"""Problems: model x loss x reduction x data, small enough for a dense oracle, each with a seed and an id."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from models import (
    BatchNormConv,
    CellLoop,
    GroupedQuery,
    Mixture,
    MultiHead,
    Normed,
    PatchTransformer,
    Recurrent,
    ReluCnn,
    Residual,
    UNet,
    Vae,
    negative_elbo,
)
from torch import Tensor, nn
from torch.nn import functional as F

from disthess.problem import Problem


@dataclass(frozen=True)
class Case:
    """A named problem.

    Attributes:
        name: Test id.
        make: Builds the problem in float64 from a fixed seed.
        independent: What the proof of sample independence must find.
        ggn: Whether the model's outputs are known.
        graph: Whether export captures it.
        slow: Whether it is run only with ``-m slow``, where another case is much like it.
    """

    name: str
    make: Callable[[], Problem]
    independent: bool = True
    ggn: bool = True
    graph: bool = True
    slow: bool = False


class SkipGate(nn.Module):
    """MLP with an additive skip and a multiplicative gate."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.gate, self.out = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.fc1(x))
        h = h + F.silu(self.fc2(h)) * torch.sigmoid(self.gate(x))
        return self.out(h * h)


class Cnn(nn.Module):
    """Two convolutions, a pool, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.head = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 2, 3, stride=2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(torch.relu(self.c1(x)), 1)
        return self.head(F.gelu(self.c2(h)).flatten(1))


class UnrolledRnn(nn.Module):
    """One weight used at every time step."""

    def __init__(self, steps: int = 4) -> None:
        super().__init__()
        self.steps = steps
        self.inner, self.recur, self.head = nn.Linear(2, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], 4, dtype=x.dtype)
        for step in range(self.steps):
            h = torch.tanh(self.inner(x[:, step]) + self.recur(h))
        return self.head(h)


class Attention(nn.Module):
    """Embedding, one transformer block by hand, a head over all positions."""

    def __init__(self, vocabulary: int = 7, width: int = 4, length: int = 3) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(vocabulary, width), nn.Parameter(0.3 * torch.randn(length, width))
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm, self.up, self.head = nn.LayerNorm(width), nn.Linear(width, 6), nn.Linear(6, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place
        attended = F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), is_causal=True)
        x = self.norm(x + self.o(attended))
        return self.head(F.gelu(self.up(x))).transpose(1, 2)


class TiedAutoencoder(nn.Module):
    """Encoder and decoder share one matrix, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias, self.back = (nn.Parameter(0.6 * torch.randn(*s)) for s in ((3, 5), (3,), (5,)))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.weight, self.bias)), self.weight.t(), self.back)


class TiedLanguageModel(nn.Module):
    """Embedding and output head are the same parameter object."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(ids)))).transpose(1, 2)


class BatchNormNet(nn.Module):
    """Batch norm in training: samples are coupled."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.norm(self.fc1(x))))


class TwoHeads(nn.Module):
    """Two outputs in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.left, self.right = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.trunk(x))
        return {"left": self.left(h), "right": self.right(h), "inner": h}


def two_head_loss(outputs: dict[str, Tensor], targets: tuple[Tensor, Tensor]) -> Tensor:
    """A regression head, a classification head and a penalty on an inner node."""
    regression = (outputs["left"] - targets[0]).square().mean()
    return regression + 0.5 * F.cross_entropy(outputs["right"], targets[1]) + 0.1 * outputs["inner"].pow(4).mean()


def weight_decay_objective(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A data term and a quartic penalty on the weights themselves."""
    data = F.mse_loss(model(batch["x"]), batch["y"])
    return data + 0.01 * sum(p.square().sum() ** 2 for p in model.parameters())


def contrastive_objective(model: nn.Module, batch: Tensor) -> Tensor:
    """Every sample is compared with every other."""
    z = F.normalize(model(batch), dim=1)
    return F.cross_entropy(z @ z.T / 0.5, torch.arange(len(batch)).roll(1))


class BranchOnValue(nn.Module):
    """Python control flow on a tensor's value: export cannot capture it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.fc1(x))
        if h.sum() > -1e9:
            h = h * 2
        return self.fc2(h)


class OddShapes(nn.Module):
    """A vector parameter, a scalar one, einsum, cat, slices, a parameter used three times in different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.scale, self.shift = (nn.Parameter(0.5 * torch.randn(s)) for s in ((4, 4), (), (4,)))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("ni,ij->nj", x, self.matrix) * self.scale + self.shift
        left, right = h[:, :2], h[:, 2:]
        h = torch.cat([left * right, left.exp(), right], dim=1)[:, :4]
        return (h @ self.matrix.t()).sigmoid() + self.matrix.diagonal() * self.scale


class EncoderLayer(nn.Module):
    """torch's own transformer layer, whose attention flattens tokens before samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, activation="gelu")
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


class Lstm(nn.Module):
    """torch's own LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def _seeded(build: Callable[[torch.Generator], Problem]) -> Callable[[], Problem]:
    def make() -> Problem:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return build(torch.Generator().manual_seed(2))

    return make


def _normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def _classes(g: torch.Generator, count: int, *shape: int) -> Tensor:
    return torch.randint(count, shape, generator=g)


def _problem(model: nn.Module, batches: list[object], **options: object) -> Problem:
    return Problem(model.double(), batches=batches, **options)  # type: ignore[arg-type]


CASES: tuple[Case, ...] = (
    Case("mlp_skip_gate", _seeded(lambda g: _problem(SkipGate(), [(_normal(g, 6, 3), _normal(g, 6, 2))], loss="mse"))),
    Case(
        "mlp_two_batches_sum",
        _seeded(
            lambda g: _problem(
                SkipGate(),
                [(_normal(g, 3, 3), _normal(g, 3, 2)), (_normal(g, 4, 3), _normal(g, 4, 2))],
                loss="mse",
                reduction="sum",
                weights=[0.7, 2.0],
            )
        ),
    ),
    Case("cnn", _seeded(lambda g: _problem(Cnn(), [(_normal(g, 4, 1, 6, 6), _classes(g, 3, 4))], loss="cross_entropy"))),
    Case("rnn", _seeded(lambda g: _problem(UnrolledRnn(), [(_normal(g, 5, 4, 2), _normal(g, 5, 2))], loss="mse"))),
    Case("attention", _seeded(lambda g: _problem(Attention(), [(_classes(g, 7, 4, 3), _classes(g, 7, 4, 3))], loss="cross_entropy"))),
    Case("tied_autoencoder", _seeded(lambda g: (lambda x: _problem(TiedAutoencoder(), [(x, x)], loss="mse"))(_normal(g, 5, 5)))),
    Case("tied_language_model", _seeded(lambda g: _problem(TiedLanguageModel(), [(_classes(g, 6, 4, 3), _classes(g, 6, 4, 3))], loss="cross_entropy"))),
    Case("batch_norm_train", _seeded(lambda g: _problem(BatchNormNet().train(), [(_normal(g, 6, 3), _classes(g, 2, 6))], loss="cross_entropy")), independent=False),
    Case("batch_norm_eval", _seeded(lambda g: _problem(BatchNormNet().eval(), [(_normal(g, 6, 3), _classes(g, 2, 6))], loss="cross_entropy"))),
    Case("two_heads", _seeded(lambda g: _problem(TwoHeads(), [(_normal(g, 5, 3), (_normal(g, 5, 2), _classes(g, 3, 5)))], loss=two_head_loss))),
    Case("hinge", _seeded(lambda g: _problem(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), [(_normal(g, 6, 3), _classes(g, 2, 6).double() * 2 - 1)], loss="hinge"))),
    Case("weight_decay", _seeded(lambda g: _problem(nn.Sequential(nn.Linear(3, 4), nn.Softplus(), nn.Linear(4, 2)), [{"x": _normal(g, 5, 3), "y": _normal(g, 5, 2)}], objective=weight_decay_objective)), ggn=False),
    Case("contrastive", _seeded(lambda g: _problem(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), [_normal(g, 5, 3)], objective=contrastive_objective)), independent=False, ggn=False),
    Case("branch_on_value", _seeded(lambda g: _problem(BranchOnValue(), [(_normal(g, 5, 3), _normal(g, 5, 2))], loss="mse")), graph=False),
    Case("odd_shapes", _seeded(lambda g: _problem(OddShapes(), [(_normal(g, 5, 4), _normal(g, 5, 4))], loss="mse"))),
    Case("encoder_layer", _seeded(lambda g: _problem(EncoderLayer(), [(_normal(g, 4, 3, 4), _classes(g, 2, 4))], loss="cross_entropy"))),
    Case("lstm", _seeded(lambda g: _problem(Lstm(), [(_normal(g, 4, 3, 2), _normal(g, 4, 2))], loss="mse"))),
    Case("mlp_sigmoid", _seeded(lambda g: _problem(nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2)), [(_normal(g, 5, 3), _normal(g, 5, 2))], loss="mse")), slow=True),
    Case("mlp_relu", _seeded(lambda g: _problem(nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4), nn.LeakyReLU(0.2), nn.Linear(4, 3)), [(_normal(g, 6, 3), _classes(g, 3, 6))], loss="cross_entropy"))),
    Case("cnn_relu_max_pool", _seeded(lambda g: _problem(ReluCnn(), [(_normal(g, 3, 1, 8, 8), _classes(g, 3, 3))], loss="cross_entropy"))),
    Case("layer_norm", _seeded(lambda g: _problem(Normed(nn.LayerNorm(2)), [(_normal(g, 5, 3), _normal(g, 5, 2))], loss="mse")), slow=True),
    Case("group_norm", _seeded(lambda g: _problem(Normed(nn.GroupNorm(2, 4)), [(_normal(g, 5, 3), _normal(g, 5, 2))], loss="mse"))),
    Case("rms_norm", _seeded(lambda g: _problem(Normed(nn.RMSNorm(2)), [(_normal(g, 5, 3), _normal(g, 5, 2))], loss="mse"))),
    Case("instance_norm", _seeded(lambda g: _problem(Normed(nn.InstanceNorm1d(4, affine=True)), [(_normal(g, 5, 3), _normal(g, 5, 2))], loss="mse")), slow=True),
    Case("batch_norm_images", _seeded(lambda g: _problem(BatchNormConv().train(), [(_normal(g, 3, 1, 4, 4), _classes(g, 2, 3))], loss="cross_entropy")), independent=False),
    Case("residual", _seeded(lambda g: _problem(Residual(), [(_normal(g, 5, 3), _normal(g, 5, 2))], loss="mse")), slow=True),
    Case("rnn_module", _seeded(lambda g: _problem(Recurrent(nn.RNN(2, 3, batch_first=True), 3), [(_normal(g, 4, 3, 2), _normal(g, 4, 2))], loss="mse")), slow=True),
    Case("gru_module", _seeded(lambda g: _problem(Recurrent(nn.GRU(2, 3, batch_first=True, bidirectional=True), 6), [(_normal(g, 4, 3, 2), _normal(g, 4, 2))], loss="mse")), slow=True),
    Case("lstm_two_layers", _seeded(lambda g: _problem(Recurrent(nn.LSTM(2, 2, num_layers=2, batch_first=True), 2), [(_normal(g, 4, 3, 2), _normal(g, 4, 2))], loss="mse")), slow=True),
    Case("gru_loop", _seeded(lambda g: _problem(CellLoop(nn.GRUCell(2, 3)), [(_normal(g, 4, 3, 2), _normal(g, 4, 2))], loss="mse")), slow=True),
    Case("lstm_loop", _seeded(lambda g: _problem(CellLoop(nn.LSTMCell(2, 3)), [(_normal(g, 4, 3, 2), _normal(g, 4, 2))], loss="mse"))),
    Case("vae", _seeded(lambda g: _problem(Vae(), [{"x": torch.rand(5, 4, generator=g, dtype=torch.float64), "noise": _normal(g, 5, 2)}], objective=negative_elbo)), ggn=False),
    Case("mixture_soft", _seeded(lambda g: _problem(Mixture(None), [(_normal(g, 5, 3), _normal(g, 5, 2))], loss="mse")), slow=True),
    Case("mixture_top2", _seeded(lambda g: _problem(Mixture(2), [(_normal(g, 5, 3), _normal(g, 5, 2))], loss="mse"))),
    Case("unet", _seeded(lambda g: _problem(UNet(), [(_normal(g, 3, 1, 4, 4), _normal(g, 3, 1, 4, 4))], loss="mse"))),
    Case("multi_head", _seeded(lambda g: _problem(MultiHead(), [(_normal(g, 4, 3, 4), _classes(g, 2, 4))], loss="cross_entropy"))),
    Case("grouped_query", _seeded(lambda g: _problem(GroupedQuery(), [(_normal(g, 4, 3, 4), _normal(g, 4, 1))], loss="mse"))),
    Case("patch_transformer", _seeded(lambda g: _problem(PatchTransformer(), [(_normal(g, 3, 1, 4, 4), _classes(g, 2, 3))], loss="cross_entropy")), slow=True),
    Case("one_sample", _seeded(lambda g: _problem(SkipGate(), [(_normal(g, 1, 3), _normal(g, 1, 2))], loss="mse")), independent=False),
)  # fmt: skip


def cases(typical: tuple[str, ...] | None = None, graph: bool = False) -> list[object]:
    """Parameters of a test over all cases; those not typical of what it tests (or slow ones) are marked slow.

    Args:
        typical: Names to run in every test run; None for all that are not slow.
        graph: Whether to leave out cases that cannot be captured.
    """
    return [
        pytest.param(case, id=case.name, marks=pytest.mark.slow if _is_slow(case, typical) else ())
        for case in CASES
        if case.graph or not graph
    ]


def _is_slow(case: Case, typical: tuple[str, ...] | None) -> bool:
    return case.slow if typical is None else case.name not in typical
