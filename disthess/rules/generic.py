"""Rules for operations without closed forms: derivatives of the operation itself by autograd, batched over the stack.

Reverse mode alone is used, which more operations support than forward mode. With the pullback ``u -> D^T u``:

* ``D^T f''`` is the pullback;
* ``D x'`` is the pullback of the pullback, as a function of u (it is linear in u);
* ``S x'`` is the pullback of ``x -> D(x)^T delta`` (S is symmetric).

A double backward can be wrong (some fused kernels' are), so `check_rule` compares the rule with central differences of
first-order gradients, once per operation and capture.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor
from torch.func import vjp, vmap
from typing_extensions import override

from disthess.errors import RuleError
from disthess.rules.base import AbstractRule, Call, Stack, Stacks

Function = Callable[..., Tensor]


@final
class GenericRule(AbstractRule):
    """Any differentiable operation."""

    __slots__ = ()

    @override
    def tangent(self, call: Call, tangents: Stacks) -> Stack:
        slots = tuple(tangents)
        return push(_restricted(call, slots), [call.inputs[slot] for slot in slots], [tangents[slot] for slot in slots])

    @override
    def cotangent(
        self, call: Call, cotangent: Stack | None, tangents: Stacks, wanted: tuple[int, ...]
    ) -> dict[int, Stack]:
        slots = tuple(sorted({*tangents, *wanted}))
        function = _restricted(call, slots)
        point = [call.inputs[slot] for slot in slots]
        found: dict[int, Stack] = {}
        if cotangent is not None:
            found = dict(zip(slots, pull(function, point, [cotangent]), strict=True))
        if tangents:
            some = next(iter(tangents.values()))
            seeds = [
                tangents[slot] if slot in tangents else some.new_zeros(some.shape[0], *call.inputs[slot].shape)
                for slot in slots
            ]
            for slot, bend in zip(slots, pull(_slope(function, call.delta), point, seeds), strict=True):
                found[slot] = found[slot] + bend if slot in found else bend
        return {slot: found[slot] for slot in wanted if slot in found}


@final
class LinearMapRule(AbstractRule):
    """An operation that is linear in its tensors taken together: S is zero.

    Args:
        axes: Of an operation of one tensor that works on its last axes alone and leaves them where they are, how many.
    """

    __slots__ = ("_axes",)

    def __init__(self, axes: int | None = None) -> None:
        self._axes = axes

    @override
    def tangent(self, call: Call, tangents: Stacks) -> Stack:
        slots = tuple(tangents)
        return push(_restricted(call, slots), [call.inputs[slot] for slot in slots], [tangents[slot] for slot in slots])

    @override
    def cotangent(
        self, call: Call, cotangent: Stack | None, tangents: Stacks, wanted: tuple[int, ...]
    ) -> dict[int, Stack]:
        if cotangent is None:
            return {}
        point = [call.inputs[slot] for slot in wanted]
        return dict(zip(wanted, pull(_restricted(call, wanted), point, [cotangent]), strict=True))

    @override
    def keeps_apart(self, call: Call, slot: int, axis: int) -> int | None:
        return axis if self._axes is not None and axis < call.inputs[0].ndim - self._axes else None


def pull(
    function: Callable[..., Tensor | tuple[Tensor, ...]], point: Sequence[Tensor], seeds: Sequence[Stack]
) -> tuple[Stack, ...]:
    """Pull a stack of cotangents back through a function: one stack per argument.

    Args:
        function: Of ``len(point)`` tensors, to one tensor or as many as there are seeds.
        point: Where.
        seeds: ``[K, *value]`` each.

    Returns:
        ``[K, *argument]`` each.
    """
    with torch.enable_grad():
        value, pullback = vjp(function, *point)[:2]

        def one(*entries: Tensor) -> tuple[Tensor, ...]:
            return pullback(entries if isinstance(value, tuple) else entries[0])

        return _over_stack(one, seeds)


def push(function: Function, point: Sequence[Tensor], seeds: Sequence[Stack]) -> Stack:
    """Push a stack of tangents forward through a function: ``[K, *value]``."""
    with torch.enable_grad():
        value, pullback = vjp(function, *point)[:2]
        back = vjp(pullback, torch.zeros_like(value))[1]
        return _over_stack(lambda *entries: back(tuple(entries)), seeds)[0]


def _over_stack(one: Callable[..., tuple[Tensor, ...]], seeds: Sequence[Stack]) -> tuple[Stack, ...]:
    """Apply to each entry of the stack; by a loop where an operation cannot be batched."""
    try:
        with warnings.catch_warnings():
            # Slow batching of a rare operation is no news to the user.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            result = vmap(one)(*seeds)
    except RuntimeError:
        rows = [one(*(seed[k] for seed in seeds)) for k in range(len(seeds[0]))]
        result = tuple(torch.stack([row[place] for row in rows]) for place in range(len(rows[0])))
    return tuple(entry.detach() for entry in result)


def _restricted(call: Call, slots: Sequence[int]) -> Function:
    """The operation as a function of some slots, the others held."""

    def function(*values: Tensor) -> Tensor:
        tensors = list(call.inputs)
        for slot, value in zip(slots, values, strict=True):
            tensors[slot] = value
        return call.run(*tensors)

    return function


def _slope(function: Function, delta: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    """``x -> D(x)^T delta``."""

    def slope(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(vjp(function, *values)[1](delta))

    return slope


CHECK_TOLERANCE = 1e-5
"""Largest relative disagreement with central differences."""

CHECK_STEPS = (1e-4, 1e-5)
CHECK_DIRECTIONS = 3


def check_rule(call: Call, rule: AbstractRule, active: tuple[int, ...], name: str) -> None:
    """Compare a rule with central differences of first-order gradients, in float64, at the call's own point.

    Args:
        call: The point; its delta is replaced by a random one if it is zero.
        rule: The rule in doubt.
        active: Slots that depend on parameters.
        name: The node's name, for the message.

    Raises:
        RuleError: No step size of any of three random directions agrees. A kink may spoil one, an error spoils all.
    """
    generator = torch.Generator().manual_seed(0)
    worst = float("inf")
    for _ in range(CHECK_DIRECTIONS):
        try:
            worst = min(worst, _disagreement(_double(call, generator), rule, active, generator))
        except (RuntimeError, NotImplementedError) as reason:
            raise RuleError(
                _advice(name, call.op, f"torch cannot differentiate it twice ({_clip(reason)})")
            ) from reason
        if worst <= CHECK_TOLERANCE:
            return
    raise RuleError(
        _advice(name, call.op, f"its second derivative disagrees with central differences by {worst:.1e} (relative)")
    )


def _advice(name: str, op: str, what: str) -> str:
    return (
        f"{name} is {op}, for which disthess has no rule of its own, and {what} in torch {torch.__version__}. Write it with "
        "elementary operations (sums, products, powers, exponentials) instead."
    )


def _clip(reason: BaseException) -> str:
    text = " ".join(str(reason).split())
    return text if len(text) <= 160 else text[:157] + "..."


def _double(call: Call, generator: torch.Generator) -> Call:
    """The same call in float64, with a random delta."""
    inputs = tuple(value.double() if value.is_floating_point() else value for value in call.inputs)
    output = call.run(*inputs).detach()
    delta = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.device)
    return Call(call.op, inputs, call.arguments, call.run, output, delta, call.batch, call.batch_inputs, call.samples)


def _disagreement(call: Call, rule: AbstractRule, active: tuple[int, ...], generator: torch.Generator) -> float:
    points = [call.inputs[slot] for slot in active]
    moves = [
        torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device) * (1e-8 + p.abs().mean())
        for p in points
    ]
    tangents = {slot: move.unsqueeze(0) for slot, move in zip(active, moves, strict=True)}
    moved = rule.tangent(call, tangents)[0]
    bends = rule.cotangent(call, None, tangents, active)
    slopes = rule.cotangent(call, call.delta.unsqueeze(0), {}, active)
    best = float("inf")
    for step in CHECK_STEPS:
        high, low = (
            _first_order(call, active, [p + sign * step * m for p, m in zip(points, moves, strict=True)])
            for sign in (1, -1)
        )
        errors = [_relative(moved, (high[0] - low[0]) / (2 * step), call.output)]
        here = _first_order(call, active, points)
        for place, slot in enumerate(active):
            zero = torch.zeros_like(points[place])
            bend = bends[slot][0] if slot in bends else zero
            slope = slopes[slot][0] if slot in slopes else zero
            errors.append(_relative(bend, (high[1][place] - low[1][place]) / (2 * step), here[1][place]))
            errors.append(_relative(slope, here[1][place], here[1][place]))
        best = min(best, max(errors))
    return best


def _relative(found: Tensor, wanted: Tensor, scale: Tensor) -> float:
    size = max(float(wanted.norm()), 1e-6 * float(scale.norm()), 1e-300)
    return float((found - wanted).norm()) / size


def _first_order(call: Call, active: tuple[int, ...], values: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The output, and ``D^T delta`` of each active slot, by ordinary reverse mode."""
    with torch.enable_grad():
        leaves = [value.detach().clone().requires_grad_() for value in values]
        output = _restricted(call, active)(*leaves)
        inner = (output * call.delta).sum()
        if not inner.requires_grad:
            return output.detach(), [torch.zeros_like(leaf) for leaf in leaves]
        slopes = torch.autograd.grad(inner, leaves, allow_unused=True, materialize_grads=True)
    return output.detach(), [slope.detach() for slope in slopes]
