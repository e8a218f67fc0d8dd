"""Functions of one value, entry by entry: ``D = diag f'(x)``, ``S = diag(delta f''(x))``.

At kinks f' is what torch's own first derivative is there, and f'' is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from disthess.rules.base import AbstractRule, Call, Stack, Stacks

Derivative = Callable[[Call, Tensor, Tensor], Tensor]
"""From a call, its input x and its output y to a derivative, of x's shape."""


@final
class ElementwiseRule(AbstractRule):
    """One function.

    Args:
        first: ``f'``.
        second: ``f''``, or None where it is zero everywhere it exists.
    """

    __slots__ = ("_first", "_second")

    def __init__(self, first: Derivative, second: Derivative | None) -> None:
        self._first = first
        self._second = second

    @override
    def tangent(self, call: Call, tangents: Stacks) -> Stack:
        return tangents[0] * self._slope(call)

    @override
    def cotangent(
        self, call: Call, cotangent: Stack | None, tangents: Stacks, wanted: tuple[int, ...]
    ) -> dict[int, Stack]:
        total = None if cotangent is None else cotangent * self._slope(call)
        second = self._second
        if 0 in tangents and second is not None:
            bend = call.once("bend", lambda: call.delta * second(call, call.inputs[0], call.output))
            total = tangents[0] * bend if total is None else total.addcmul_(tangents[0], bend)
        return {} if total is None else {0: total}

    @override
    def keeps_apart(self, call: Call, slot: int, axis: int) -> int | None:
        return axis

    def _slope(self, call: Call) -> Tensor:
        return call.once("slope", lambda: self._first(call, call.inputs[0], call.output))


def _step(condition: Tensor, like: Tensor, on: float = 1.0, off: float = 0.0) -> Tensor:
    return torch.where(condition, torch.full_like(like, on), torch.full_like(like, off))


def _tanh(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return 1 - y * y


def _tanh2(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return -2 * y * (1 - y * y)


def _sigmoid(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return y * (1 - y)


def _sigmoid2(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return y * (1 - y) * (1 - 2 * y)


def _silu(call: Call, x: Tensor, y: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _silu2(call: Call, x: Tensor, y: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s) * (2 + x * (1 - 2 * s))


def _gelu(call: Call, x: Tensor, y: Tensor) -> Tensor:
    if call.arguments["approximate"] == "tanh":
        u, du, _ = _gelu_inner(x)
        t = torch.tanh(u)
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * du
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * _phi(x)


def _gelu2(call: Call, x: Tensor, y: Tensor) -> Tensor:
    if call.arguments["approximate"] == "tanh":
        u, du, ddu = _gelu_inner(x)
        t = torch.tanh(u)
        slope = 1 - t * t
        return slope * du + 0.5 * x * slope * (ddu - 2 * t * du * du)
    return _phi(x) * (2 - x * x)


def _gelu_inner(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    c, k = math.sqrt(2 / math.pi), 0.044715
    return c * (x + k * x**3), c * (1 + 3 * k * x * x), c * 6 * k * x


def _phi(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _relu(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return _step(y > 0, x)


def _relu6(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return _step((x > 0) & (x < 6), x)


def _leaky(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return _step(x > 0, x, 1.0, float(call.arguments["negative_slope"]))


def _elu_settings(call: Call) -> tuple[float, float, float]:
    return tuple(float(call.arguments[name]) for name in ("alpha", "scale", "input_scale"))  # type: ignore[return-value]


def _elu(call: Call, x: Tensor, y: Tensor) -> Tensor:
    alpha, scale, inner = _elu_settings(call)
    return torch.where(x > 0, torch.full_like(x, scale), scale * inner * alpha * torch.exp(inner * x.clamp(max=0)))


def _elu2(call: Call, x: Tensor, y: Tensor) -> Tensor:
    alpha, scale, inner = _elu_settings(call)
    return torch.where(x < 0, scale * inner**2 * alpha * torch.exp(inner * x.clamp(max=0)), torch.zeros_like(x))


_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805


def _selu(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(x > 0, torch.full_like(x, _SELU_SCALE), _SELU_SCALE * _SELU_ALPHA * torch.exp(x.clamp(max=0)))


def _selu2(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(x < 0, _SELU_SCALE * _SELU_ALPHA * torch.exp(x.clamp(max=0)), torch.zeros_like(x))


def _celu(call: Call, x: Tensor, y: Tensor) -> Tensor:
    alpha = float(call.arguments["alpha"])
    return torch.where(x > 0, torch.ones_like(x), torch.exp(x.clamp(max=0) / alpha))


def _celu2(call: Call, x: Tensor, y: Tensor) -> Tensor:
    alpha = float(call.arguments["alpha"])
    return torch.where(x < 0, torch.exp(x.clamp(max=0) / alpha) / alpha, torch.zeros_like(x))


def _softplus(call: Call, x: Tensor, y: Tensor) -> Tensor:
    beta, threshold = float(call.arguments["beta"]), float(call.arguments["threshold"])
    return torch.where(x * beta > threshold, torch.ones_like(x), torch.sigmoid(beta * x))


def _softplus2(call: Call, x: Tensor, y: Tensor) -> Tensor:
    beta, threshold = float(call.arguments["beta"]), float(call.arguments["threshold"])
    s = torch.sigmoid(beta * x)
    return torch.where(x * beta > threshold, torch.zeros_like(x), beta * s * (1 - s))


def _mish(call: Call, x: Tensor, y: Tensor) -> Tensor:
    t, s = torch.tanh(F.softplus(x)), torch.sigmoid(x)
    return t + x * s * (1 - t * t)


def _mish2(call: Call, x: Tensor, y: Tensor) -> Tensor:
    t, s = torch.tanh(F.softplus(x)), torch.sigmoid(x)
    slope = 1 - t * t
    return slope * s * (2 + x * (1 - s) - 2 * x * s * t)


def _logsigmoid(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return torch.sigmoid(-x)


def _logsigmoid2(call: Call, x: Tensor, y: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return -s * (1 - s)


def _hardtanh(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return _step((x > float(call.arguments["min_val"])) & (x < float(call.arguments["max_val"])), x)


def _hardswish(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(x <= -3, torch.zeros_like(x), torch.where(x < 3, x / 3 + 0.5, torch.ones_like(x)))


def _hardswish2(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return _step((x > -3) & (x < 3), x, 1.0 / 3.0)


def _hardshrink(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return _step(x.abs() > float(call.arguments["lambd"]), x)


def _threshold(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return _step(x > float(call.arguments["threshold"]), x)


def _clamp(call: Call, x: Tensor, y: Tensor) -> Tensor:
    low, high = call.arguments.get("min"), call.arguments.get("max")
    inside = torch.ones_like(x, dtype=torch.bool)
    if low is not None:
        inside &= x >= float(low)
    if high is not None:
        inside &= x <= float(high)
    return inside.to(x.dtype)


def _exponent(call: Call) -> float:
    return float(call.arguments["exponent"])


def _pow(call: Call, x: Tensor, y: Tensor) -> Tensor:
    p = _exponent(call)
    return torch.zeros_like(x) if p == 0 else p * x.pow(p - 1)


def _pow2(call: Call, x: Tensor, y: Tensor) -> Tensor:
    p = _exponent(call)
    return torch.zeros_like(x) if p in (0.0, 1.0) else p * (p - 1) * x.pow(p - 2)


def _rule(
    first: Callable[[Tensor, Tensor], Tensor], second: Callable[[Tensor, Tensor], Tensor] | None
) -> ElementwiseRule:
    """A rule from derivatives of x and y alone."""
    bend = None if second is None else (lambda call, x, y: second(x, y))
    return ElementwiseRule(lambda call, x, y: first(x, y), bend)


def _smooth() -> dict[str, AbstractRule]:
    root = math.sqrt(math.pi)
    return {
        "exp.default": _rule(lambda x, y: y, lambda x, y: y),
        "exp2.default": _rule(lambda x, y: y * math.log(2), lambda x, y: y * math.log(2) ** 2),
        "expm1.default": _rule(lambda x, y: y + 1, lambda x, y: y + 1),
        "log.default": _rule(lambda x, y: 1 / x, lambda x, y: -1 / (x * x)),
        "log2.default": _rule(lambda x, y: 1 / (x * math.log(2)), lambda x, y: -1 / (x * x * math.log(2))),
        "log10.default": _rule(lambda x, y: 1 / (x * math.log(10)), lambda x, y: -1 / (x * x * math.log(10))),
        "log1p.default": _rule(lambda x, y: 1 / (1 + x), lambda x, y: -((1 + x) ** -2)),
        "sqrt.default": _rule(lambda x, y: 0.5 / y, lambda x, y: -0.25 / (y * x)),
        "rsqrt.default": _rule(lambda x, y: -0.5 * y**3, lambda x, y: 0.75 * y**5),
        "reciprocal.default": _rule(lambda x, y: -y * y, lambda x, y: 2 * y**3),
        "square.default": _rule(lambda x, y: 2 * x, lambda x, y: torch.full_like(x, 2.0)),
        "sin.default": _rule(lambda x, y: torch.cos(x), lambda x, y: -y),
        "cos.default": _rule(lambda x, y: -torch.sin(x), lambda x, y: -y),
        "tan.default": _rule(lambda x, y: 1 + y * y, lambda x, y: 2 * y * (1 + y * y)),
        "sinh.default": _rule(lambda x, y: torch.cosh(x), lambda x, y: y),
        "cosh.default": _rule(lambda x, y: torch.sinh(x), lambda x, y: y),
        "atan.default": _rule(lambda x, y: 1 / (1 + x * x), lambda x, y: -2 * x * (1 + x * x) ** -2),
        "asinh.default": _rule(lambda x, y: (1 + x * x).rsqrt(), lambda x, y: -x * (1 + x * x) ** -1.5),
        "erf.default": _rule(lambda x, y: 2 / root * torch.exp(-x * x), lambda x, y: -4 / root * x * torch.exp(-x * x)),
        "abs.default": _rule(lambda x, y: x.sign(), None),
        "neg.default": _rule(lambda x, y: -torch.ones_like(x), None),
    }


def rules() -> dict[str, AbstractRule]:
    """Operation to rule."""
    table: dict[str, AbstractRule] = {
        **_smooth(),
        "tanh.default": ElementwiseRule(_tanh, _tanh2),
        "sigmoid.default": ElementwiseRule(_sigmoid, _sigmoid2),
        "silu.default": ElementwiseRule(_silu, _silu2),
        "gelu.default": ElementwiseRule(_gelu, _gelu2),
        "relu.default": ElementwiseRule(_relu, None),
        "relu6.default": ElementwiseRule(_relu6, None),
        "leaky_relu.default": ElementwiseRule(_leaky, None),
        "elu.default": ElementwiseRule(_elu, _elu2),
        "selu.default": ElementwiseRule(_selu, _selu2),
        "celu.default": ElementwiseRule(_celu, _celu2),
        "softplus.default": ElementwiseRule(_softplus, _softplus2),
        "mish.default": ElementwiseRule(_mish, _mish2),
        "log_sigmoid.default": ElementwiseRule(_logsigmoid, _logsigmoid2),
        "log_sigmoid_forward.default": ElementwiseRule(_logsigmoid, _logsigmoid2),
        "hardtanh.default": ElementwiseRule(_hardtanh, None),
        "hardswish.default": ElementwiseRule(_hardswish, _hardswish2),
        "hardshrink.default": ElementwiseRule(_hardshrink, None),
        "softshrink.default": ElementwiseRule(_hardshrink, None),
        "threshold.default": ElementwiseRule(_threshold, None),
        "clamp.default": ElementwiseRule(_clamp, None),
        "clamp_min.default": ElementwiseRule(_clamp, None),
        "clamp_max.default": ElementwiseRule(_clamp, None),
        "pow.Tensor_Scalar": ElementwiseRule(_pow, _pow2),
    }
    return {f"aten.{name}": rule for name, rule in table.items()}
