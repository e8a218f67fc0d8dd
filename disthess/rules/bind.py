"""From an operation and its arguments to a `Call`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from disthess.graph.ir import BatchAxis
from disthess.graph.run import operation
from disthess.rules.base import Call, Slot


@lru_cache(maxsize=4096)
def _schema(op: str) -> tuple[tuple[str, Any, bool], ...]:
    """(name, default, keyword only) of each argument."""
    return tuple((a.name, a.default_value, a.kwarg_only) for a in operation(op)._schema.arguments)  # type: ignore[attr-defined]


def make_call(
    op: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    output: int | None = None,
    value: Tensor | None = None,
    delta: Tensor | None = None,
    batch: BatchAxis | None = None,
    batch_inputs: tuple[BatchAxis | None, ...] | None = None,
    samples: int = 1,
) -> Call:
    """Normalise arguments against the operation's schema.

    Args:
        op: Overload name, ``aten.linear.default``.
        args: Positional arguments, tensors included.
        kwargs: Keyword arguments.
        output: Which output, for operations with several.
        value: The output, computed if None.
        delta: ``dL/d output``; zeros if None.
        batch: Batch axis of the output.
        batch_inputs: Batch axis of each slot; none if None.
        samples: Number of samples.

    Returns:
        The call; tensors are slots in schema order.

    Example:
        >>> import torch
        >>> make_call("aten.add.Tensor", (torch.ones(2), 3.0), {}).arguments["alpha"]
        1
    """
    inputs: list[Tensor] = []
    arguments: dict[str, Any] = {}
    positional: list[tuple[str, bool]] = []
    for place, (name, default, keyword) in enumerate(_schema(op)):
        given = args[place] if place < len(args) else kwargs.get(name, default)
        arguments[name] = _slots(given, inputs)
        positional.append((name, keyword))
    run = _runner(op, arguments, tuple(positional), output)
    result = run(*inputs) if value is None else value
    return Call(
        op=op,
        inputs=tuple(inputs),
        arguments=arguments,
        run=run,
        output=result,
        delta=torch.zeros_like(result) if delta is None else delta,
        batch=batch,
        batch_inputs=(None,) * len(inputs) if batch_inputs is None else batch_inputs,
        samples=samples,
    )


def _slots(value: Any, inputs: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        inputs.append(value)
        return Slot(len(inputs) - 1)
    if isinstance(value, (list, tuple)):
        return tuple(_slots(entry, inputs) for entry in value)
    return value


def _fill(value: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(value, Slot):
        return tensors[value.index]
    if isinstance(value, tuple):
        return [_fill(entry, tensors) for entry in value]
    return value


def _runner(
    op: str, arguments: Mapping[str, Any], positional: tuple[tuple[str, bool], ...], output: int | None
) -> Callable[..., Tensor]:
    def run(*tensors: Tensor) -> Tensor:
        args = [_fill(arguments[name], tensors) for name, keyword in positional if not keyword]
        kwargs = {name: _fill(arguments[name], tensors) for name, keyword in positional if keyword}
        result = operation(op)(*args, **kwargs)
        return result if output is None else result[output]

    return run
