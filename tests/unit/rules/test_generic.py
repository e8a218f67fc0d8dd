"""The generic rule, its self-check, and the table's own rules."""

from __future__ import annotations

import pytest
import torch

from disthess.errors import RuleError
from disthess.rules.bind import make_call
from disthess.rules.generic import GenericRule, check_rule
from disthess.rules.table import has_rule, merge, refusal, rule_for


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


CALLS = [
    ("aten.atan2.default", (normal(3, 2), normal(3, 2).flip(0) + 3), (0, 1), None),
    ("aten.cumprod.default", (normal(3, 4), 1), (0,), None),
    ("aten.logdet.default", (normal(3, 3) @ normal(3, 3).T + torch.eye(3, dtype=torch.float64),), (0,), None),
    ("aten.linalg_vector_norm.default", (normal(3, 2), 2, [1]), (0,), None),
    ("aten.sort.default", (normal(3, 4),), (0,), 0),
    ("aten.linalg_inv_ex.default", (normal(3, 3) + 3 * torch.eye(3, dtype=torch.float64),), (0,), 0),
    ("aten.det.default", (normal(3, 3),), (0,), None),
]


@pytest.mark.parametrize(("op", "args", "active", "output"), CALLS, ids=[call[0] for call in CALLS])
def test_the_check_passes_where_torch_is_right(
    op: str, args: tuple, active: tuple[int, ...], output: int | None
) -> None:
    assert not has_rule(op)
    check_rule(make_call(op, args, {}, output=output), GenericRule(), active, "node")


@pytest.mark.parametrize(("op", "args", "active", "output"), CALLS, ids=[call[0] for call in CALLS])
def test_derivatives_equal_those_of_the_whole_jacobian_and_hessian(
    op: str, args: tuple, active: tuple[int, ...], output: int | None
) -> None:
    g = torch.Generator().manual_seed(4)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)  # noqa: E731
    call = make_call(op, args, {}, output=output)
    call = make_call(op, args, {}, output=output, delta=draw(*call.output.shape))
    points = tuple(call.inputs[slot] for slot in active)
    moves = {slot: draw(2, *call.inputs[slot].shape) for slot in active}
    bent = draw(2, *call.output.shape)

    def inner(*values: torch.Tensor) -> torch.Tensor:
        return (call.run(*values) * call.delta).sum()

    jacobian = torch.autograd.functional.jacobian(call.run, points)
    hessian = torch.autograd.functional.hessian(inner, points)
    count = call.output.numel()
    maps = [part.reshape(count, -1) for part in jacobian]
    flat = [moves[slot].reshape(2, -1) for slot in active]
    rule = GenericRule()
    pushed = sum(move @ part.T for move, part in zip(flat, maps, strict=True))
    torch.testing.assert_close(rule.tangent(call, moves).reshape(2, -1), pushed, rtol=1e-11, atol=1e-12)
    found = rule.cotangent(call, bent, moves, active)
    for place, slot in enumerate(active):
        size = points[place].numel()
        bends = [hessian[place][other].reshape(size, -1) for other in range(len(active))]
        wanted = bent.reshape(2, -1) @ maps[place] + sum(m @ b.T for m, b in zip(flat, bends, strict=True))
        torch.testing.assert_close(found[slot].reshape(2, -1), wanted, rtol=1e-11, atol=1e-12)


def test_the_check_finds_the_wrong_double_backward_of_weight_norm() -> None:
    call = make_call("aten._weight_norm_interface.default", (normal(3, 4), normal(3, 1).abs() + 1, 0), {}, output=0)
    with pytest.raises(RuleError, match=r"fc1 is aten\._weight_norm_interface"):
        check_rule(call, GenericRule(), (0, 1), "fc1")


def test_the_check_finds_a_missing_double_backward() -> None:
    call = make_call("aten.hardsigmoid.default", (normal(3, 4),), {})
    with pytest.raises(RuleError, match="elementary"):
        check_rule(call, GenericRule(), (0,), "act")


def test_the_check_finds_a_wrong_rule() -> None:
    call = make_call("aten.tanh.default", (normal(3, 4),), {})
    check_rule(call, rule_for("aten.tanh.default"), (0,), "act")
    with pytest.raises(RuleError):
        check_rule(call, rule_for("aten.sigmoid.default"), (0,), "act")


def test_two_rules_for_one_operation_are_refused() -> None:
    rule = GenericRule()
    with pytest.raises(RuleError, match="two rules"):
        merge({"one": lambda: {"aten.x": rule}, "two": lambda: {"aten.x": rule}})


def test_random_operations_are_refused() -> None:
    assert refusal("aten.native_dropout.default")
    assert refusal("aten.tanh.default") is None
