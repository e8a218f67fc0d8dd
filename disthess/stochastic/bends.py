"""Kinks between a reparametrised draw and the loss, seen in autograd's graph.

The pathwise estimator differentiates through the sampled value. Where the loss's first derivative jumps in that value, it misses
the mean of jump times density, whatever the number of samples: ``E relu(theta + xi)`` has second derivative ``phi(theta)``, and
every pathwise sample says 0.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

_KINKED = (
    "Relu", "Abs", "LeakyRelu", "Prelu", "Clamp", "Hardtanh", "Threshold", "Maximum", "Minimum", "Amax", "Amin", "MaxBackward",
    "MinBackward", "MaxPool", "AdaptiveMaxPool", "Sort", "Topk", "Kthvalue", "Median", "Where", "MaskedFill", "Hardshrink",
    "Softshrink", "Sign", "Selu", "Fmax", "Fmin", "Cummax", "Cummin", "Hardswish", "Hardsigmoid", "L1Loss",
)  # fmt: skip


def kinks_after(value: Tensor, drawn: Tensor) -> tuple[str, ...]:
    """Names of operations with kinks that lie between a draw and ``value``; squares of kinks at 0 are smooth once, and left out.

    Args:
        value: What was computed from the draw.
        drawn: The draw, not a leaf.
    """
    root, mark = value.grad_fn, drawn.grad_fn
    if root is None or mark is None:
        return ()
    children: dict[Any, list[Any]] = {}
    users: dict[Any, list[Any]] = {}
    stack = [root]
    while stack:
        node = stack.pop()
        if node in children:
            continue
        children[node] = [entry for entry, _ in node.next_functions if entry is not None]
        for child in children[node]:
            users.setdefault(child, []).append(node)
            stack.append(child)
    after: set[Any] = set()
    stack = list(users.get(mark, []))
    while stack:
        node = stack.pop()
        if node not in after:
            after.add(node)
            stack.extend(users.get(node, []))
    found = {type(node).__name__ for node in after if _is_kinked(node) and not _is_squared(users.get(node, []))}
    return tuple(sorted(found))


def _is_kinked(node: Any) -> bool:
    name = type(node).__name__
    if name.startswith("Elu"):
        return bool(getattr(node, "_saved_alpha", 0) * getattr(node, "_saved_input_scale", 1) != 1)
    return name.startswith(_KINKED)


def _is_squared(users: list[Any]) -> bool:
    powers = [type(user).__name__.startswith("PowBackward0") and user._saved_exponent >= 2 for user in users]
    return bool(powers) and all(powers)
