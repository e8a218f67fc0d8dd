"""The one table: operation to rule. What is not in it is served by the generic rule, after a self-check; or refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

from disthess.errors import RuleError
from disthess.rules import (
    arithmetic,
    contraction,
    convolution,
    elementwise,
    lookup,
    norm,
    pieces,
    pooling,
    reduction,
    shape,
    softmax,
)
from disthess.rules.base import AbstractRule
from disthess.rules.generic import GenericRule
from disthess.rules.linear import LinearRule

_RANDOM = (
    "it draws random numbers, so the objective differs from call to call. Draw them once and pass them in the batch."
)

REFUSED: Mapping[str, str] = {
    **{
        f"aten.{name}": _RANDOM
        for name in (
            "bernoulli.default", "bernoulli.p", "rand_like.default", "randn_like.default", "rand.default", "randn.default",
            "native_dropout.default", "multinomial.default", "normal.Tensor_Tensor", "rrelu.default", "randint.low",
        )
    },
    "aten._embedding_bag.default": "embedding_bag has no double backward. Use embedding followed by a mean or sum.",
    "aten._ctc_loss.default": "ctc_loss has no double backward. Choose another loss.",
}  # fmt: skip
"""Operations without a Hessian, and what to do instead."""


def merge(sources: Mapping[str, Callable[[], dict[str, AbstractRule]]]) -> dict[str, AbstractRule]:
    """One table out of several.

    Raises:
        RuleError: An operation has two rules.
    """
    table: dict[str, AbstractRule] = {}
    origin: dict[str, str] = {}
    for name, rules in sources.items():
        for op, rule in rules().items():
            if op in table:
                raise RuleError(f"{op} has two rules, in {origin[op]} and in {name}.")
            table[op] = rule
            origin[op] = name
    return table


@lru_cache(maxsize=1)
def table() -> Mapping[str, AbstractRule]:
    """Every operation with a rule of its own."""
    return merge(
        {
            "linear": lambda: {"aten.linear.default": LinearRule()},
            "shape": shape.rules,
            "pieces": pieces.rules,
            "arithmetic": arithmetic.rules,
            "elementwise": elementwise.rules,
            "reduction": reduction.rules,
            "contraction": contraction.rules,
            "convolution": convolution.rules,
            "softmax": softmax.rules,
            "norm": norm.rules,
            "lookup": lookup.rules,
            "pooling": pooling.rules,
        }
    )


@lru_cache(maxsize=1)
def _generic() -> AbstractRule:
    return GenericRule()


def has_rule(op: str) -> bool:
    """Whether an operation has a rule of its own."""
    return op in table()


def rule_for(op: str) -> AbstractRule:
    """The operation's rule, or the generic one."""
    return table().get(op) or _generic()


def refusal(op: str) -> str | None:
    """What to do instead of an operation that has no Hessian, or None."""
    return REFUSED.get(op)
