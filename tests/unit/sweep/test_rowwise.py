"""Layers behind which rows of a sample do not meet: they are taken for samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from swept import ATOL, check_halved, check_parts, check_small_tiles
from torch import Tensor, nn
from torch.nn import functional as F

import disthess
from disthess.graph.waves import leading_to, source_leaves
from disthess.prepare import Options, Prepared, prepare
from disthess.sweep.frame import Frame
from disthess.sweep.outputs import shortcut_of
from disthess.sweep.primal import compute_primals
from disthess.sweep.rowwise import Rowwise
from disthess.types import Span

CLASSES = 3


class Tokens(nn.Module):
    """A network of every token, with a residual branch, a norm and a gate; classes along the axis that the loss wants."""

    def __init__(self, *, shared: bool = False) -> None:
        super().__init__()
        self.first, self.norm, self.up, self.down = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 6), nn.Linear(6, 4)
        self.gate, self.weigh, self.head = nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, CLASSES)
        self.scale = nn.Parameter(torch.rand(4) + 0.5)
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, 4]`` to ``[N, 3, T]``."""
        h = torch.tanh(self.first(x)) * self.scale
        h = h + self.down(F.gelu(self.up(self.norm(h))))
        h = h * torch.sigmoid(self.gate(h))
        h = h * self.weigh(h)
        return self.head(self.first(h) if self.shared else h).transpose(1, 2)


class Flat(nn.Module):
    """The same kind of network, whose tokens are put into the batch axis, before or after its layers."""

    def __init__(self, *, early: bool) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, CLASSES)
        self.early = early

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, 4]`` to ``[N T, 3]``."""
        if self.early:
            x = x.reshape(-1, 4)
            h = torch.tanh(self.first(x)).reshape(-1, 2, 5)
            return self.head(torch.sigmoid(self.second(h))).flatten(0, 1)
        return self.head(torch.sigmoid(self.second(torch.tanh(self.first(x))))).reshape(-1, CLASSES)


class TimeFirst(nn.Module):
    """Tokens before samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, 4]`` to ``[N, 3, T]``."""
        h = F.silu(self.norm(self.first(x.transpose(0, 1))))
        return self.head(h).permute(1, 2, 0)


class Block(nn.Module):
    """Attention, behind which tokens do not meet."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(4, 12), nn.Linear(4, 4), nn.LayerNorm(4)
        self.up, self.head = nn.Linear(4, 6), nn.Linear(6, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, 4]`` to ``[N, 3, T]``."""
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.head(F.gelu(self.up(self.norm(x)))).transpose(1, 2)


class Gated(nn.Module):
    """Two branches that meet, each with parameters, one of them normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.norm, self.down = nn.Linear(4, 6), nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, 4]`` to ``[N, 3, T]``."""
        return self.head(F.silu(self.gate(x)) * self.down(self.norm(torch.tanh(self.up(x))))).transpose(1, 2)


class Shifted(nn.Module):
    """All tokens but the last are asked what comes next, but for those that are padding."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T + 1, 4]`` to ``[N T, 3]``."""
        x = torch.cat([x, x[:, :1]], 1)
        logits = self.head(torch.tanh(self.first(x)))[:, :-1]
        return logits.masked_fill(x[:, 1:, :1] > 0.5, 0.0).reshape(-1, CLASSES)


class Meeting(nn.Module):
    """Tokens that meet behind a layer, in one way or another."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)
        self.other = nn.Linear(4, 4)
        self.place, self.mix = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(2, 2))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 2, 4]`` to ``[N, 3, 2]``."""
        h = torch.tanh(self.first(x))
        match self.how:
            case "place":
                h = torch.exp(h * self.place)
            case "mean":
                h = h * h.mean(1, keepdim=True)
            case "swapped":
                h = h * h.flip(1)
            case "mixed":
                h = self.mix @ h
            case "crossed":
                h = h[:, :, :2] @ h.transpose(1, 2)[:, :2] @ h
            case "neighbour":
                h = torch.cat([h[:, :1] * h[:, 1:], h[:, 1:]], 1)
            case "beside":
                h = torch.exp(h) * self.other(x).flip(1)
            case "softmax":
                h = h.softmax(1)
        return self.head(h).transpose(1, 2)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "tokens": (Tokens, ("first.weight", "up.weight", "down.weight", "gate.weight", "weigh.weight", "head.weight")),
    "early": (lambda: Flat(early=True), ("first.weight", "second.weight", "head.weight")),
    "late": (lambda: Flat(early=False), ("first.weight", "second.weight", "head.weight")),
    "time_first": (TimeFirst, ("first.weight", "head.weight")),
    "shifted": (Shifted, ("first.weight", "head.weight")),
    "gated": (Gated, ("gate.weight", "up.weight", "down.weight", "head.weight")),
    "block": (Block, ("out.weight", "up.weight", "head.weight")),
}


def loss(outputs: Tensor, classes: Tensor) -> Tensor:
    """Of logits with an axis of tokens, or of one row a token."""
    return F.cross_entropy(outputs, classes if outputs.ndim > 2 else classes.flatten())


def problem(model: nn.Module, tokens: tuple[int, ...] = (2, 2)) -> disthess.Problem:
    batches = [(torch.randn(4, count, 4).double(), torch.randint(CLASSES, (4, count))) for count in tokens]
    return disthess.Problem(model.double(), loss=loss, batches=batches)


def seeded(name: str) -> disthess.Problem:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return problem(NETS[name][0]())


def rowwise(prepared: Prepared, name: str) -> Rowwise | None:
    primal = compute_primals(prepared.problem, prepared.programs)[0]
    ranks = {spec.name: spec.rank for spec in prepared.plan.layout.parameters}
    uses = [node for node in primal.graph.nodes if node.kind == "use" and node.live]
    wanted = leading_to(primal.graph, [node.index for node in uses if ranks[node.op] >= ranks[name]])
    leaves = source_leaves(primal.graph, name, name)
    return shortcut_of(Frame(primal, Span(0, primal.samples)), leaves, wanted).rowwise


@pytest.mark.parametrize("name", NETS)
def test_rows_are_samples_and_the_hessian_is_right(name: str, tmp_path: Path) -> None:
    made = seeded(name)
    prepared = prepare(made, Options(basis="output"))
    weights = [spec.name for spec in prepared.plan.layout.parameters if len(spec.shape) == 2]
    found = {weight: rowwise(prepared, weight) for weight in weights}
    assert {weight for weight, rows in found.items() if rows is not None} == set(NETS[name][1])
    assert {rows.count for rows in found.values() if rows is not None} == {3 if name == "shifted" else 2}
    check_parts(made, tmp_path)


@pytest.mark.parametrize("name", NETS)
def test_small_tiles_and_stacks_agree(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_small_tiles(seeded(name), tmp_path, monkeypatch, 1_000)


@pytest.mark.parametrize("name", ["tokens", "early"])
def test_less_memory_gives_the_same_rows(name: str) -> None:
    check_halved(seeded(name))


@pytest.mark.parametrize("shared", ["sum", "uses"])
def test_a_weight_used_twice(shared: str, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        made = problem(Tokens(shared=True))
    found = rowwise(prepare(made, Options(basis="output")), "up.weight")
    assert found is not None
    store = disthess.compute(made, tmp_path / "x.zarr", basis="output", shared=shared)
    np.testing.assert_allclose(store.dense(), disthess.reference_hessian(made), atol=ATOL)


def test_batches_may_differ_in_rows(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        made = problem(Tokens(), (3, 1, 2))
    store = disthess.compute(made, tmp_path / "x.zarr", basis="output")
    np.testing.assert_allclose(store.dense(), disthess.reference_hessian(made), atol=ATOL)


@pytest.mark.parametrize("how", ["place", "mean", "swapped", "mixed", "crossed", "neighbour", "beside", "softmax"])
def test_rows_that_meet_are_no_samples(how: str, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        made = problem(Meeting(how))
    prepared = prepare(made, Options(basis="output"))
    assert rowwise(prepared, "first.weight") is None
    assert rowwise(prepared, "head.weight") is not None
    store = disthess.compute(made, tmp_path / "x.zarr", basis="output")
    np.testing.assert_allclose(store.dense(), disthess.reference_hessian(made), atol=ATOL)
