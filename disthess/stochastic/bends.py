"""Kinks and jumps between the random draws and the loss, found by watching every operation of an evaluation.

Derivatives may be taken inside an expectation only where the integrand is smooth enough in the parameters. At a point of the noise
where an operation has a kink or a jump *that moves with the parameters*, every sample's Hessian misses the mean of jump times
density, whatever the number of samples: ``E relu(theta + xi)`` has second derivative ``phi(theta)``, and every sample says 0. It
does not matter whether the draw is reparametrised by torch, by hand (``theta + sigma * noise``), or enters by its log-probability
(``log p`` of a Laplace draw has a kink at its location). A kink that stays where it is does no harm, nor does one of a discrete
draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

_KINKED = frozenset(
    {
        "relu", "relu6", "abs", "leaky_relu", "prelu", "_prelu_kernel", "rrelu_with_noise", "rrelu_with_noise_functional",
        "clamp", "clamp_min", "clamp_max", "hardtanh", "threshold", "maximum", "minimum", "fmax", "fmin", "max", "min", "amax",
        "amin", "aminmax", "max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d",
        "fractional_max_pool2d", "fractional_max_pool3d", "sort", "topk", "kthvalue", "median", "nanmedian", "mode", "cummax",
        "cummin", "softshrink", "hardswish", "hardsigmoid", "multi_margin_loss", "multilabel_margin_loss_forward", "renorm",
        "gt", "ge", "lt", "le", "sign", "sgn", "signbit", "floor", "ceil", "trunc", "round", "frac", "remainder", "fmod",
        "floor_divide", "hardshrink", "heaviside", "copysign", "argmax", "argmin", "argsort", "bucketize", "searchsorted",
    }
)  # fmt: skip
_ZERO_AT_KINK = frozenset({"relu", "abs", "leaky_relu", "prelu", "_prelu_kernel"})
_SHAPE_ONLY = ("_like", "new_", "empty", "size", "stride", "numel")


@dataclass(frozen=True, slots=True)
class Bend:
    """An operation with a kink or a jump.

    Attributes:
        op: Its name.
        draws: Draws that its input depends on, in the order in which they were made.
    """

    op: str
    draws: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Call:
    name: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    sources: frozenset[str]
    moves: bool
    kinked: bool
    zero_at_kink: bool
    squares: bool


@final
class Trace(TorchDispatchMode):
    """Watches an evaluation: which values depend on which draws, and which move with the parameters.

    Values are told apart by their memory, so that a view is the value it views. Everything is kept alive meanwhile.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[_Call] = []
        self._kept: list[Tensor] = []
        self._sources: dict[int, frozenset[str]] = {}
        self._moves: dict[int, bool] = {}
        self._continuous: dict[str, bool] = {}
        self._branches: list[_Call] = []
        self._control: frozenset[str] = frozenset()

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        result = func(*args, **given)
        name = func._schema.name.split("::")[1]
        if name.endswith("_") and not name.startswith("__"):
            name = name[:-1]
        if not any(part in name for part in _SHAPE_ONLY):
            self._note(name, args, given, result)
        return result

    def mark(self, name: str, value: Tensor, continuous: bool, fixed: bool) -> frozenset[str]:
        """Say that a value was drawn; returns the draws that its distribution depends on.

        Args:
            name: Of the draw.
            value: What was drawn.
            continuous: Whether it has a density.
            fixed: Whether the value stays when the parameters move (its log-probability moves instead).
        """
        key = self._key(value)
        before = self._sources.get(key, frozenset()) | self._control
        self._sources[key] = before | {name}
        self._continuous[name] = continuous
        if fixed:
            self._moves[key] = False
            self._sources[key] = frozenset({name})
        return before

    def sources(self, value: Tensor) -> frozenset[str]:
        """The draws that a value depends on, not those before a fixed draw; all that the program read as numbers are in."""
        return self._sources.get(self._key(value), frozenset()) | self._control

    def bends(self, loss: Tensor) -> tuple[Bend, ...]:
        """Kinks and jumps that move with the parameters against the noise, and that the loss depends on."""
        # Where the program branches on a value, what the loss is depends on it, and no tensor tells.
        needed = {self._key(loss), *(key for call in self._branches for key in call.reads)}
        reached: list[_Call] = []
        for call in reversed(self._calls):
            if needed.intersection(call.writes):
                needed.update(call.reads)
                reached.append(call)
        found = {}
        for call in reached:
            noise = tuple(name for name in self._continuous if self._continuous[name] and name in call.sources)
            if call.kinked and call.moves and noise and not self._is_squared(call, reached):
                found[call.name] = Bend(call.name, noise)
        return tuple(found[name] for name in sorted(found))

    def _note(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        inputs = list(_tensors((list(args), dict(kwargs))))
        outputs = list(_tensors(result))
        reads, writes = tuple(map(self._key, inputs)), tuple(map(self._key, outputs))
        # The slopes of a prelu do not move its kink.
        bending = inputs[:1] if name in ("prelu", "_prelu_kernel") else inputs
        call = _Call(
            name=name,
            reads=reads,
            writes=writes,
            sources=frozenset().union(*(self._sources.get(key, frozenset()) for key in reads)),
            moves=any(self._is_moving(entry) for entry in bending),
            kinked=_is_kinked(name, args, kwargs, inputs, outputs) or (name == "sqrt" and self._is_square(reads)),
            zero_at_kink=name in _ZERO_AT_KINK or (name == "clamp_min" and args[1] == 0),
            squares=_squares(name, args),
        )
        moves = any(map(self._is_moving, inputs))
        for key in writes:
            self._sources[key] = self._sources.get(key, frozenset()) | call.sources
            self._moves[key] = self._moves.get(key, False) or moves
        if name == "_local_scalar_dense":
            self._control = self._control | call.sources
            if isinstance(result, bool):
                self._branches.append(call)
        self._calls.append(call)

    def _is_moving(self, tensor: Tensor) -> bool:
        key = self._key(tensor)
        return self._moves.get(key, tensor.requires_grad)

    def _is_square(self, keys: Sequence[int]) -> bool:
        """Whether a value was made by squaring entries: its root is a magnitude."""
        makers = [call for call in self._calls if set(keys[:1]).intersection(call.writes)]
        return bool(makers) and makers[-1].squares

    @staticmethod
    def _is_squared(call: _Call, reached: Sequence[_Call]) -> bool:
        """Whether a value that is 0 at its kink is only ever squared: smooth once, which is enough."""
        users = [other for other in reached if set(call.writes).intersection(other.reads) and other is not call]
        users = [other for other in users if not set(other.writes) <= set(call.writes)]
        return call.zero_at_kink and bool(users) and all(user.squares for user in users)

    def _key(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return int(tensor.untyped_storage()._cdata)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _is_kinked(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> bool:
    special = _SPECIAL.get(name)
    if special is not None:
        return special(args, kwargs, inputs, outputs)
    return name in _KINKED


def _probability_clamp(args: Sequence[Any], kwargs: Mapping[str, Any], inputs: Any, outputs: Any) -> bool:
    """A clamp, but for the one by which torch keeps probabilities off 0 and 1 by a rounding error."""
    low = kwargs.get("min", args[1] if len(args) > 1 else None)
    return not (isinstance(low, float) and 0 < low <= torch.finfo(torch.float32).eps)


def _elu(args: Sequence[Any], kwargs: Mapping[str, Any], inputs: Any, outputs: Any) -> bool:
    given = [float(entry) for entry in args[1:]]
    alpha, scale, inner = given + [1.0, 1.0, 1.0][len(given) :]
    return alpha * inner != 1.0 or scale <= 0


def _norm(args: Sequence[Any], kwargs: Mapping[str, Any], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
    """A norm over several entries has its kink at one point, which no density sees; a magnitude has it on a surface."""
    order = args[1] if len(args) > 1 and args[1] is not None else 2
    return float(order) == 1 or math.isinf(float(order)) or inputs[0].numel() == outputs[0].numel()


def _cast(args: Sequence[Any], kwargs: Mapping[str, Any], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
    return inputs[0].is_floating_point() and not outputs[0].is_floating_point()


def _rounded(args: Sequence[Any], kwargs: Mapping[str, Any], inputs: Any, outputs: Any) -> bool:
    return kwargs.get("rounding_mode") is not None


def _distance(args: Sequence[Any], kwargs: Mapping[str, Any], inputs: Sequence[Tensor], outputs: Any) -> bool:
    order = float(args[2 if len(inputs) > 1 else 1])
    return order == 1 or math.isinf(order) or inputs[0].shape[-1] == 1


_SPECIAL: Mapping[str, Callable[[Sequence[Any], Mapping[str, Any], Sequence[Tensor], Sequence[Tensor]], bool]] = {
    "clamp": _probability_clamp,
    "elu": _elu,
    "linalg_vector_norm": _norm,
    "norm": _norm,
    "_to_copy": _cast,
    "div": _rounded,
    "_cdist_forward": _distance,
    "_pdist_forward": _distance,
}


def _squares(name: str, args: Sequence[Any]) -> bool:
    if name == "pow":
        return isinstance(args[1], (int, float)) and args[1] >= 2
    return name == "mul" and args[0] is args[1]


def is_twice_differentiable(value: Tensor) -> bool:
    """Whether torch has second derivatives of a reparametrised draw by what it was made of (it has none of a gamma's shape)."""
    leaves, functions = _origins(value)
    if not leaves:
        return True
    if any(hasattr(getattr(function, "backward", None), "__wrapped__") for function in functions):
        return False  # marked once differentiable, which torch does not always notice by itself
    try:
        first = torch.autograd.grad(value.sum(), leaves, create_graph=True, allow_unused=True)
        again = [entry.sum() for entry in first if entry is not None and entry.requires_grad]
        if again:
            torch.autograd.grad(torch.stack(again).sum(), leaves, retain_graph=True, allow_unused=True)
    except RuntimeError:
        return False
    return True


def _origins(value: Tensor) -> tuple[list[Tensor], list[Any]]:
    """Leaves that a value was made of, and the functions written in Python on the way."""
    leaves: list[Tensor] = [value] if value.grad_fn is None and value.requires_grad else []
    functions: list[Any] = []
    seen: set[Any] = set()
    stack: list[Any] = [] if value.grad_fn is None else [value.grad_fn]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            leaves.append(variable)
        if hasattr(node, "_forward_cls"):
            functions.append(node._forward_cls)
        stack.extend(child for child, _ in node.next_functions if child is not None)
    return leaves, functions
