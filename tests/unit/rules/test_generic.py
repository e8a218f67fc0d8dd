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
]


@pytest.mark.parametrize(("op", "args", "active", "output"), CALLS, ids=[call[0] for call in CALLS])
def test_the_check_passes_where_torch_is_right(
    op: str, args: tuple, active: tuple[int, ...], output: int | None
) -> None:
    assert not has_rule(op)
    check_rule(make_call(op, args, {}, output=output), GenericRule(), active, "node")


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
