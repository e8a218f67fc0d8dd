"""Play a recording: straight-line Python, one call per instruction, every value dropped after its last use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from disthess.sweep.record import Instruction, Recording, Var

Player = Callable[..., tuple[Tensor, ...]]


def player(recording: Recording) -> Player:
    """A function of the recording's inputs that does what was recorded.

    Generated and compiled, as the standard library does for dataclasses: a loop over instructions takes a tenth longer where
    vectors are few and tensors small.
    """
    names: dict[str, Any] = {}
    last = _last_uses(recording)
    kept = {result.index for result in recording.results if isinstance(result, Var)} | set(range(recording.inputs))
    lines = [f"def play({_list('v', range(recording.inputs))}):"]
    for place, instruction in enumerate(recording.instructions):
        lines.append(f"    {_line(instruction, place, names)}")
        dead = [index for index, use in last.items() if use == place and index not in kept]
        if dead:
            lines.append(f"    del {_list('v', dead)}")
    results = ", ".join(_argument(result, names) for result in recording.results)
    lines.append(f"    return ({results},)")
    exec(compile("\n".join(lines), "<recording>", "exec"), names)
    play: Player = names["play"]
    return play


def _line(instruction: Instruction, place: int, names: dict[str, Any]) -> str:
    names[f"op{place}"] = instruction.op
    given = [_argument(value, names) for value in instruction.args]
    given += [f"{key}={_argument(value, names)}" for key, value in instruction.kwargs]
    call = f"op{place}({', '.join(given)})"
    left = ", ".join("_" if index is None else f"v{index}" for index in instruction.outputs)
    return f"{left}{',' if instruction.many else ''} = {call}"


def _argument(value: Any, names: dict[str, Any]) -> str:
    if isinstance(value, Var):
        return f"v{value.index}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_argument(entry, names) for entry in value)}]"
    if value is None or isinstance(value, (bool, int)):
        return repr(value)
    key = f"c{len(names)}"
    names[key] = value
    return key


def _last_uses(recording: Recording) -> dict[int, int]:
    last: dict[int, int] = {}
    for place, instruction in enumerate(recording.instructions):
        for index in (*instruction.reads(), *(out for out in instruction.outputs if out is not None)):
            last[index] = place
    return last


def _list(prefix: str, indices: Sequence[int]) -> str:
    return ", ".join(f"{prefix}{index}" for index in indices)
