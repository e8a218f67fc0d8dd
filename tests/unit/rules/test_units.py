"""Unit vectors as seeds: every rule's short cut against the stack that they stand for."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from disthess.graph.ir import BatchAxis
from disthess.rules.base import Call, Units
from disthess.rules.bind import make_call
from disthess.rules.table import rule_for


def call(op: str, *args: object, **kwargs: object) -> Call:
    """A call in double precision whose inputs are the tensors among the arguments."""
    name, overload = op.removeprefix("aten.").split(".")
    output = getattr(getattr(torch.ops.aten, name), overload)(*args, **kwargs)
    inputs = [entry for entry in args if isinstance(entry, Tensor)]
    axes = tuple(BatchAxis(0, 1, 1) if entry.shape[:1] == output.shape[:1] else None for entry in inputs)
    return make_call(
        op,
        args,
        dict(kwargs),
        output=None,
        value=output,
        delta=torch.randn_like(output),
        batch=BatchAxis(0, 1, 1),
        batch_inputs=axes,
        samples=len(output),
    )


def randn(*shape: int) -> Tensor:
    """Double precision."""
    return torch.randn(*shape, dtype=torch.float64)


CALLS = {
    "linear": (lambda: call("aten.linear.default", randn(5, 3), randn(4, 3), randn(4)), 1),
    "linear rows": (lambda: call("aten.linear.default", randn(5, 2, 3), randn(4, 3)), 1),
    "linear bias": (lambda: call("aten.linear.default", randn(5, 3), randn(4, 3), randn(4)), 2),
    "conv2d": (lambda: call("aten.conv2d.default", randn(5, 2, 6, 5), randn(3, 2, 3, 2), None, [2, 1], [1, 0], [1, 2]), 1),
    "conv1d": (lambda: call("aten.conv1d.default", randn(5, 2, 6), randn(3, 2, 3), randn(3), [1], [1]), 1),
    "conv3d": (lambda: call("aten.conv3d.default", randn(5, 2, 4, 3, 3), randn(2, 2, 2, 2, 2)), 1),
    "conv2d same": (lambda: call("aten.conv2d.padding", randn(5, 2, 6, 5), randn(3, 2, 3, 3), None, [1, 1], "same"), 1),
    "conv2d groups": (lambda: call("aten.conv2d.default", randn(5, 4, 4, 4), randn(4, 2, 3, 3), None, [1], [1], [1], 2), 1),
    "transposed": (lambda: call("aten.conv_transpose2d.input", randn(5, 3, 4, 4), randn(3, 2, 3, 3), None, [2, 2], [1, 1]), 1),
    "embedding": (lambda: call("aten.embedding.default", randn(6, 3), torch.tensor([[0, 5], [2, 2], [1, 0]])), 0),
    "padded": (lambda: call("aten.embedding.default", randn(6, 3), torch.tensor([[0, 5], [2, 2], [1, 0]]), 2), 0),
    "layer norm": (lambda: call("aten.layer_norm.default", randn(5, 3), [3], randn(3), randn(3)), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("started", [False, True])
def test_unit_vectors_do_what_their_stack_does(name: str, started: bool) -> None:
    torch.manual_seed(0)
    make, slot = CALLS[name]
    made = make()
    rule = rule_for(made.op)
    shape = tuple(made.inputs[slot].shape)
    for first, last in ((0, 3), (1, made.inputs[slot].numel()), (2, 3)):
        units = Units(shape, torch.arange(first, last))
        dense = units.dense(made.inputs[slot])
        assert torch.equal(dense.flatten(1), torch.eye(dense[0].numel(), dtype=dense.dtype)[first:last])
        start = randn(len(units), *made.output.shape) if started else None
        wanted = rule.tangent(made, {slot: dense}) + (0 if start is None else start)
        found = rule.add_units(made, slot, units, None if start is None else start.clone())
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CALLS)
def test_unit_vectors_bend_as_their_stack_does(name: str) -> None:
    torch.manual_seed(1)
    make, slot = CALLS[name]
    made = make()
    rule = rule_for(made.op)
    floating = tuple(index for index, value in enumerate(made.inputs) if value.is_floating_point())
    units = Units(tuple(made.inputs[slot].shape), torch.arange(3))
    cotangent = randn(3, *made.output.shape)
    wanted = rule.cotangent(made, cotangent, {slot: units.dense(made.inputs[slot])}, floating)
    found = rule.cotangent(made, cotangent, {}, floating)
    rule.add_units_back(made, slot, units, floating, found)
    assert wanted.keys() == found.keys()
    for index, stack in wanted.items():
        torch.testing.assert_close(found[index], stack, rtol=0, atol=1e-12)


def test_what_a_call_keeps_is_not_carried_over_to_another_point() -> None:
    made = call("aten.tanh.default", randn(5, 3))
    rule = rule_for(made.op)
    stack = randn(2, 5, 3)
    torch.testing.assert_close(rule.tangent(made, {0: stack}), stack * (1 - made.output**2))
    moved = dataclasses.replace(made, inputs=(made.inputs[0] + 1,), output=torch.tanh(made.inputs[0] + 1))
    torch.testing.assert_close(rule.tangent(moved, {0: stack}), stack * (1 - moved.output**2))
    assert made.once("slope", lambda: None) is not None, "the slope is computed once for a point"
