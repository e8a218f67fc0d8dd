"""Every rule against autograd on the operation itself, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from ops import ROWS, Row, on, t
from torch import Tensor

from disthess.graph.batch import rows_by_sample, take_samples
from disthess.graph.ir import BatchAxis
from disthess.rules.base import Call, ThinRows
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
    draw = lambda like: torch.randn(K, *like.shape, generator=g, dtype=torch.float64).to(like.dtype)  # noqa: E731
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
    bends = rule.cotangent(call, None, moves, row.active)
    parts = [rule.cotangent(call, None, {slot: move}, row.active) for slot, move in moves.items()]
    for slot in row.active:
        zero = torch.zeros_like(moves[slot])
        close(sum((part.get(slot, zero) for part in parts), zero), bends.get(slot, zero), f"S, slot {slot}")
        only = rule.cotangent(call, None, moves, (slot,))
        assert set(only) <= {slot}
        close(only.get(slot), bends.get(slot, zero), f"slot {slot} alone is wanted")


PER_SAMPLE = [row for row in ROWS if row.batch is not None]


def is_source(row: Row) -> bool:
    """Whether a weight meets rows of inputs: dense layers, and convolutions without groups."""
    convolution = row.op.startswith(("aten.conv1d", "aten.conv2d", "aten.conv3d"))
    return row.op == "aten.linear.default" or (convolution and row.note not in ("groups", "no_batch"))


def has_closed_form(row: Row, slot: int) -> bool:
    """Whether the rule gives rows of a slot sample by sample itself."""
    if row.op.startswith("aten.conv") and slot == 1:
        return is_source(row)
    return (row.op, slot) != ("aten.addmm.default", 0)


@pytest.mark.parametrize("given", ["cotangent", "tangents", "all"])
@pytest.mark.parametrize("row", PER_SAMPLE, ids=[row.name for row in PER_SAMPLE])
def test_per_sample_cotangents_are_those_of_each_sample_alone(row: Row, given: str) -> None:
    call = make(row)
    rule = rule_for(row.op)
    moves, bent = stacks(call, row)
    moves, bent = {} if given == "cotangent" else moves, None if given == "tangents" else bent
    shared = [slot for slot in row.active if call.batch_inputs[slot] is None]
    assert shared, "the row has no slot to test"
    for slot in shared:
        rows = rule.cotangent_per_sample(call, bent, moves, slot)
        if given == "all":
            assert (rows is not None) == has_closed_form(row, slot), "a closed form was lost or found"
        check_thin(rule.thin_rows(call, bent, moves, slot), rows)
        if rows is None:
            continue
        assert rows.shape == (K, row.samples, *call.inputs[slot].shape)
        zero = torch.zeros_like(rows[:, 0])
        close(rows.sum(1), rule.cotangent(call, bent, moves, (slot,)).get(slot, zero), "the sum over samples")
        for sample in range(row.samples):
            part, parts = one_stack(bent, row.batch, row, sample), one_stacks(call, moves, row, sample)
            wanted = rule.cotangent(one_call(call, row, sample), part, parts, (slot,)).get(slot, zero)
            close(rows[:, sample], wanted, f"sample {sample}")


def check_thin(thin: ThinRows | None, rows: Tensor | None) -> None:
    """Outer products, where a rule has them, are the rows."""
    if thin is None:
        return
    assert rows is not None
    total = torch.zeros_like(rows)
    if thin.bent is not None:
        total = total + torch.einsum("kna,nb->knab", thin.bent, thin.inputs)
    if thin.moved is not None:
        total = total + torch.einsum("na,knb->knab", thin.deltas, thin.moved)
    close(total, rows, "outer products")


def test_a_layer_of_one_row_a_sample_has_outer_products() -> None:
    row = next(row for row in PER_SAMPLE if row.op == "aten.linear.default" and len(make(row).inputs[0].shape) == 2)
    call = make(row)
    moves, bent = stacks(call, row)
    assert rule_for(row.op).thin_rows(call, bent, {0: moves[0]}, 1) is not None
    assert rule_for(row.op).thin_rows(call, bent, {0: moves[0]}, 2) is None
    assert rule_for(row.op).thin_rows(call, bent, {1: moves[1]}, 1) is None


def one_value(value: Tensor, axis: BatchAxis | None, row: Row, sample: int) -> Tensor:
    return value if axis is None else take_samples(value, axis, Span(sample, sample + 1), row.samples)


def one_stack(stack: Tensor | None, axis: BatchAxis | None, row: Row, sample: int) -> Tensor | None:
    if stack is None or axis is None:
        return stack
    return one_value(stack, BatchAxis(axis.dim + 1, axis.outer, axis.inner), row, sample)


def one_stacks(call: Call, moves: dict[int, Tensor], row: Row, sample: int) -> dict[int, Tensor]:
    found = {slot: one_stack(move, call.batch_inputs[slot], row, sample) for slot, move in moves.items()}
    return {slot: stack for slot, stack in found.items() if stack is not None}


def one_call(call: Call, row: Row, sample: int) -> Call:
    """The operation on one sample, run anew."""
    inputs = tuple(
        one_value(value, axis, row, sample) for value, axis in zip(call.inputs, call.batch_inputs, strict=True)
    )
    output = call.run(*inputs)
    close(output, one_value(call.output, call.batch, row, sample), "the row's batch axes")
    delta = one_value(call.delta, call.batch, row, sample)
    return replace(call, inputs=inputs, output=output, delta=delta, samples=1)


SOURCES = [row for row in ROWS if is_source(row)]


@pytest.mark.parametrize("row", SOURCES, ids=[row.name for row in SOURCES])
def test_source_rows_rebuild_the_output(row: Row) -> None:
    call = make(row)
    rule = rule_for(row.op)
    rows = rule.source_rows(call, 1)
    assert rows is not None
    value = torch.einsum("nri,oi->nro", rows, call.inputs[1].flatten(1))
    if len(call.inputs) > 2:
        value = value + call.inputs[2]
    close(value, rule.source_outputs(call, call.output[None])[0], "rows of the output")
    assert rule.source_rows(call, 0) is None


@pytest.mark.parametrize("row", [row for row in SOURCES if row.op == "aten.linear.default"], ids=lambda row: row.name)
def test_a_bias_of_a_dense_layer_meets_ones(row: Row) -> None:
    call = make(row)
    if len(call.inputs) > 2:
        ones = rule_for(row.op).source_rows(call, 2)
        assert ones is not None
        assert (ones == 1).all()
        assert ones.shape == (*rows_by_sample(call.output, call.batch, call.samples).shape[:2], 1)


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_source_rows_are_given_for_dense_layers_and_plain_convolutions_alone(row: Row) -> None:
    call = make(row)
    given = [slot for slot in row.active if rule_for(row.op).source_rows(call, slot) is not None]
    last = 2 if row.op == "aten.linear.default" else 1
    assert given == ([slot for slot in row.active if 0 < slot <= last] if row in SOURCES else [])


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_float32_stays_float32(row: Row) -> None:
    if row.op == "aten.to.dtype" and row.note == "":
        pytest.skip("its dtype is an argument")
    call = make(row, torch.float32)
    moves, bent = stacks(call, row)
    rule = rule_for(row.op)
    assert rule.tangent(call, moves).dtype == torch.float32
    assert all(stack.dtype == torch.float32 for stack in rule.cotangent(call, bent, moves, row.active).values())


KINKS = [
    ("aten.relu.default", (), (0.0,)),
    ("aten.abs.default", (), (0.0,)),
    ("aten.relu6.default", (), (0.0, 6.0)),
    ("aten.leaky_relu.default", (), (0.0,)),
    ("aten.leaky_relu.default", (0.3,), (0.0,)),
    ("aten.elu.default", (), (0.0,)),
    ("aten.elu.default", (0.5, 2.0, 3.0), (0.0,)),
    ("aten.celu.default", (2.0,), (0.0,)),
    ("aten.selu.default", (), (0.0,)),
    ("aten.hardtanh.default", (), (-1.0, 1.0)),
    ("aten.hardtanh.default", (-0.5, 3.0), (-0.5, 3.0)),
    ("aten.hardswish.default", (), (-3.0, 3.0)),
    ("aten.hardshrink.default", (), (-0.5, 0.5)),
    ("aten.softshrink.default", (), (-0.5, 0.5)),
    ("aten.clamp.default", (-1.0, 3.0), (-1.0, 3.0)),
    ("aten.clamp_min.default", (0.0,), (0.0,)),
    ("aten.clamp_max.default", (1.0,), (1.0,)),
    ("aten.threshold.default", (0.0, 0.0), (0.0,)),
    ("aten.softplus.default", (1.0, 3.0), (3.0,)),
]


@pytest.mark.parametrize(("op", "rest", "kinks"), KINKS, ids=[f"{op}-{rest}" for op, rest, _ in KINKS])
def test_at_a_kink_the_first_derivative_is_torchs(op: str, rest: tuple[float, ...], kinks: tuple[float, ...]) -> None:
    points = [-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 6.0]
    assert set(kinks) <= set(points)
    x = torch.tensor(points, dtype=torch.float64, requires_grad=True)
    call = make_call(op, (x.detach(), *rest), {}, delta=torch.ones(8, dtype=torch.float64))
    wanted = torch.autograd.grad(call.run(x).sum(), x)[0]
    ones = torch.ones(1, 8, dtype=torch.float64)
    close(rule_for(op).cotangent(call, ones, {}, (0,)).get(0), wanted.unsqueeze(0), op)
    close(rule_for(op).tangent(call, {0: ones}), wanted.unsqueeze(0), op)


@pytest.mark.parametrize(("op", "rest", "kinks"), KINKS[:-1], ids=[f"{op}-{rest}" for op, rest, _ in KINKS[:-1]])
def test_at_a_kink_the_second_derivative_is_zero(op: str, rest: tuple[float, ...], kinks: tuple[float, ...]) -> None:
    x = torch.tensor(kinks, dtype=torch.float64)
    call = make_call(op, (x, *rest), {}, delta=torch.ones_like(x))
    bend = rule_for(op).cotangent(call, None, {0: torch.ones(1, len(kinks), dtype=torch.float64)}, (0,)).get(0)
    close(bend, torch.zeros(1, len(kinks), dtype=torch.float64), op)


POOLS = [
    ("aten.max_pool1d.default", (1, 2, 6), ([2],)),
    ("aten.max_pool1d.default", (1, 2, 6), ([3], [1], [1])),
    ("aten.max_pool2d.default", (1, 2, 4, 4), ([2, 2],)),
    ("aten.max_pool2d.default", (1, 2, 5, 5), ([3, 3], [1, 1], [1, 1])),
]


@pytest.mark.parametrize(("op", "shape", "rest"), POOLS)
def test_a_pool_of_ties_takes_the_entry_that_torch_takes(op: str, shape: tuple[int, ...], rest: tuple) -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randint(2, shape, generator=g).double().requires_grad_()
    call = make_call(op, (x.detach(), *rest), {})
    bent = torch.randn(K, *call.output.shape, generator=g, dtype=torch.float64)
    wanted = torch.stack([torch.autograd.grad(call.run(x), x, bent[k])[0] for k in range(K)])
    close(rule_for(op).cotangent(call, bent, {}, (0,))[0], wanted, op)


@pytest.mark.parametrize(
    ("op", "rest"), [("aten.softmax.int", (0,)), ("aten.log_softmax.int", (0,)), ("aten.logsumexp.default", ([0],))]
)
def test_softmax_of_a_number(op: str, rest: tuple) -> None:
    row = Row(op, on(t(), *rest))
    test_derivatives_equal_autograds(row)


def test_a_power_at_a_base_of_zero_is_finite() -> None:
    base = torch.tensor([0.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    exponent = torch.tensor([2.0, 3.0, 2.0], dtype=torch.float64)
    delta = torch.tensor([1.5, 2.0, 0.5], dtype=torch.float64)
    call = make_call("aten.pow.Tensor_Tensor", (base.detach(), exponent), {}, delta=delta)
    slope = torch.autograd.grad(call.run(base, exponent), base, delta, create_graph=True)[0]
    bend = torch.autograd.grad(slope.sum(), base)[0]
    rule, ones = rule_for(call.op), torch.ones(1, 3, dtype=torch.float64)
    close(rule.cotangent(call, delta.unsqueeze(0), {}, (0,))[0], slope.detach().unsqueeze(0), "D^T")
    close(rule.cotangent(call, None, {0: ones}, (0,))[0], bend.unsqueeze(0), "S")


@pytest.mark.parametrize("op", ["aten.maximum.default", "aten.minimum.default"])
def test_a_tie_is_shared_as_torch_shares_it(op: str) -> None:
    a = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64, requires_grad=True)
    call = make_call(op, (a.detach(), b.detach()), {})
    wanted = torch.autograd.grad(call.run(a, b).sum(), (a, b))
    found = rule_for(op).cotangent(call, torch.ones(1, 3, dtype=torch.float64), {}, (0, 1))
    close(found[0][0], wanted[0], "a")
    close(found[1][0], wanted[1], "b")


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_places_that_are_said_to_be_kept_apart_do_not_meet(row: Row) -> None:
    """A NaN at one place of an axis reaches that place alone."""
    call = make(row)
    rule = rule_for(row.op)
    for slot in row.active:
        for axis, size in enumerate(call.inputs[slot].shape):
            kept = rule.keeps_apart(call, slot, axis)
            for place in range(size if kept is not None else 0):
                inputs = [value.clone() for value in call.inputs]
                inputs[slot].select(axis, place).fill_(torch.nan)
                found = call.run(*inputs).isnan().transpose(0, kept or 0)
                others = [number for number in range(len(found)) if number != place]
                assert not found[others].any(), (slot, axis, kept, place)


def test_axes_are_followed_where_they_are_kept() -> None:
    """So many pairs of an operation and an axis that the test above does not pass for want of any."""
    rows = [(row, make(row)) for row in ROWS]
    kept = [
        (row.op, slot, axis)
        for row, call in rows
        for slot in row.active
        for axis in range(call.inputs[slot].ndim)
        if rule_for(row.op).keeps_apart(call, slot, axis) is not None
    ]
    for op in ("linear.default", "layer_norm.default", "log_softmax.int", "gather.default", "permute.default", "unsqueeze.default",
               "slice.Tensor", "select.int", "mean.dim", "max_pool2d.default", "avg_pool2d.default", "mul.Tensor"):  # fmt: skip
        assert any(name == f"aten.{op}" for name, _, _ in kept), op
    assert not any(name == "aten.linear.default" and slot > 0 for name, slot, _ in kept)
