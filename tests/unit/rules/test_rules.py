"""Every rule against autograd on the operation itself, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops import ROWS, Row
from torch import Tensor

from disthess.graph.batch import take_samples
from disthess.rules.base import Call
from disthess.rules.bind import make_call
from disthess.rules.table import rule_for, table
from disthess.types import Span

K = 3
TOLERANCE = 1e-11
IDS = [row.name for row in ROWS]


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors in ``dtype``, lists included."""
    if isinstance(value, list):
        return [cast(entry, dtype) for entry in value]
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def make(row: Row, dtype: torch.dtype = torch.float64) -> Call:
    """The row's call with a random delta."""
    g = torch.Generator().manual_seed(5)
    args, kwargs = row.make(g)
    args, kwargs = tuple(cast(v, dtype) for v in args), {k: cast(v, dtype) for k, v in kwargs.items()}
    call = make_call(row.op, args, kwargs, output=row.output)
    delta = torch.randn(call.output.shape, generator=g, dtype=torch.float64).to(dtype)
    inputs = row.inputs or (None,) * len(call.inputs)
    return make_call(
        row.op, args, kwargs, output=row.output, delta=delta, batch=row.batch, batch_inputs=inputs, samples=row.samples
    )


def stacks(call: Call, row: Row) -> tuple[dict[int, Tensor], Tensor]:
    g = torch.Generator().manual_seed(6)
    draw = lambda like: torch.randn(K, *like.shape, generator=g, dtype=torch.float64).to(call.delta.dtype)  # noqa: E731
    return {slot: draw(call.inputs[slot]) for slot in row.active}, draw(call.output)


def forward(call: Call, row: Row, leaves: dict[int, Tensor]) -> Tensor:
    return call.run(*(leaves.get(slot, value) for slot, value in enumerate(call.inputs)))


def oracle(call: Call, row: Row, moves: dict[int, Tensor], bent: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(D x', D^T f'' per slot, S x' per slot) for one tangent, by autograd."""
    leaves = {slot: call.inputs[slot].detach().clone().requires_grad_() for slot in row.active}
    value = forward(call, row, leaves)
    points = list(leaves.values())
    if not value.requires_grad:
        zeros = [torch.zeros_like(p) for p in points]
        return torch.zeros_like(value), zeros, zeros
    dual = torch.zeros_like(value, requires_grad=True)
    options = {"allow_unused": True, "materialize_grads": True}
    pulled = torch.autograd.grad(value, points, dual, create_graph=True, **options)
    inner = sum((p * moves[slot]).sum() for p, slot in zip(pulled, leaves, strict=True))
    pushed = (
        torch.autograd.grad(inner, dual, retain_graph=True, **options)[0]
        if inner.requires_grad
        else torch.zeros_like(value)
    )
    back = torch.autograd.grad(value, points, bent, retain_graph=True, **options)
    slopes = torch.autograd.grad((value * call.delta).sum(), points, create_graph=True, **options)
    along = sum((s * moves[slot]).sum() for s, slot in zip(slopes, leaves, strict=True))
    bends = (
        torch.autograd.grad(along, points, **options) if along.requires_grad else [torch.zeros_like(p) for p in points]
    )
    return pushed, list(back), list(bends)


def close(found: Tensor | None, wanted: Tensor, what: str) -> None:
    given = torch.zeros_like(wanted) if found is None else found
    assert given.shape == wanted.shape, (what, given.shape, wanted.shape)
    scale = max(float(wanted.abs().max()) if wanted.numel() else 0.0, 1e-3)
    assert float((given - wanted).abs().max()) <= TOLERANCE * scale if wanted.numel() else True, what


def test_every_rule_has_a_row_and_every_row_a_rule() -> None:
    assert {row.op for row in ROWS} == set(table())


def test_row_names_differ() -> None:
    assert len(set(IDS)) == len(IDS)


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_derivatives_equal_autograds(row: Row) -> None:
    call = make(row)
    rule = rule_for(row.op)
    moves, bent = stacks(call, row)
    wanted = [oracle(call, row, {s: m[k] for s, m in moves.items()}, bent[k]) for k in range(K)]
    close(rule.tangent(call, moves), torch.stack([w[0] for w in wanted]), "tangent")
    plain = rule.cotangent(call, bent, {}, row.active)
    bends = rule.cotangent(call, None, moves, row.active)
    both = rule.cotangent(call, bent, moves, row.active)
    for place, slot in enumerate(row.active):
        back = torch.stack([w[1][place] for w in wanted])
        bend = torch.stack([w[2][place] for w in wanted])
        close(plain.get(slot), back, f"D^T, slot {slot}")
        close(bends.get(slot), bend, f"S, slot {slot}")
        close(both.get(slot), back + bend, f"D^T + S, slot {slot}")


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_one_tangent_at_a_time_is_enough(row: Row) -> None:
    call = make(row)
    rule = rule_for(row.op)
    moves, _ = stacks(call, row)
    alone = [rule.tangent(call, {slot: move}) for slot, move in moves.items()]
    close(rule.tangent(call, moves), sum(alone), "tangent is linear over slots")


PER_SAMPLE = [row for row in ROWS if row.batch is not None]


@pytest.mark.parametrize("row", PER_SAMPLE, ids=[row.name for row in PER_SAMPLE])
def test_per_sample_cotangents_are_those_of_each_sample_alone(row: Row) -> None:
    call = make(row)
    rule = rule_for(row.op)
    moves, bent = stacks(call, row)
    moves = {slot: move for slot, move in moves.items() if call.batch_inputs[slot] is not None}
    for slot in row.active:
        if call.batch_inputs[slot] is not None:
            continue
        rows = rule.cotangent_per_sample(call, bent, moves, slot)
        if rows is None:
            assert row.op.startswith(("aten.conv", "aten.add", "aten.addmm")), "a hot rule lost its closed form"
            continue
        assert rows.shape == (K, row.samples, *call.inputs[slot].shape)
        close(rows.sum(1), rule.cotangent(call, bent, moves, (slot,))[slot], "the sum over samples")
        for sample in range(row.samples):
            close(rows[:, sample], one_sample(row, call, bent, moves, slot, sample), f"sample {sample}")


def one_sample(row: Row, call: Call, bent: Tensor, moves: dict[int, Tensor], slot: int, sample: int) -> Tensor:
    """The summed cotangent where every other sample's delta and cotangent are zero."""
    assert row.batch is not None

    def only(value: Tensor, lead: int) -> Tensor:
        kept = torch.zeros_like(value)
        axis = type(row.batch)(row.batch.dim + lead, row.batch.outer, row.batch.inner)
        index = torch.arange(value.shape[axis.dim])
        chosen = take_samples(index, type(row.batch)(0, axis.outer, axis.inner), Span(sample, sample + 1), row.samples)
        kept.index_copy_(axis.dim, chosen, value.index_select(axis.dim, chosen))
        return kept

    g = torch.Generator().manual_seed(5)
    args, kwargs = row.make(g)
    alone = make_call(
        row.op,
        args,
        kwargs,
        output=row.output,
        delta=only(call.delta, 0),
        batch=row.batch,
        batch_inputs=row.inputs,
        samples=row.samples,
    )
    return rule_for(row.op).cotangent(alone, only(bent, 1), moves, (slot,))[slot]


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_float32_stays_float32(row: Row) -> None:
    if row.op in ("aten.to.dtype",):
        pytest.skip("its dtype is an argument")
    call = make(row, torch.float32)
    moves, bent = stacks(call, row)
    rule = rule_for(row.op)
    assert rule.tangent(call, moves).dtype == torch.float32
    assert all(stack.dtype == torch.float32 for stack in rule.cotangent(call, bent, moves, row.active).values())


KINKS = [
    ("aten.relu.default", ()),
    ("aten.abs.default", ()),
    ("aten.relu6.default", ()),
    ("aten.leaky_relu.default", ()),
    ("aten.elu.default", ()),
    ("aten.hardtanh.default", ()),
    ("aten.hardswish.default", ()),
    ("aten.hardshrink.default", ()),
    ("aten.softshrink.default", ()),
    ("aten.clamp.default", (-1.0, 3.0)),
    ("aten.clamp_min.default", (0.0,)),
    ("aten.threshold.default", (0.0, 0.0)),
    ("aten.celu.default", ()),
    ("aten.selu.default", ()),
]


@pytest.mark.parametrize(("op", "rest"), KINKS, ids=[op for op, _ in KINKS])
def test_at_a_kink_the_first_derivative_is_torchs(op: str, rest: tuple[float, ...]) -> None:
    x = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 6.0], dtype=torch.float64, requires_grad=True)
    call = make_call(op, (x.detach(), *rest), {}, delta=torch.ones(8, dtype=torch.float64))
    wanted = torch.autograd.grad(call.run(x).sum(), x)[0]
    ones = torch.ones(1, 8, dtype=torch.float64)
    close(rule_for(op).cotangent(call, ones, {}, (0,)).get(0), wanted.unsqueeze(0), op)


@pytest.mark.parametrize("op", ["aten.maximum.default", "aten.minimum.default"])
def test_a_tie_is_shared_as_torch_shares_it(op: str) -> None:
    a = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64, requires_grad=True)
    call = make_call(op, (a.detach(), b.detach()), {})
    wanted = torch.autograd.grad(call.run(a, b).sum(), (a, b))
    found = rule_for(op).cotangent(call, torch.ones(1, 3, dtype=torch.float64), {}, (0, 1))
    close(found[0][0], wanted[0], "a")
    close(found[1][0], wanted[1], "b")
