"""What differs between the fingerprints of two problems, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_MOST = 12


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Sentences that say how ``new`` differs from ``old``; empty where they agree.

    Tuples and lists are the same thing, since a fingerprint goes through JSON. After a dozen sentences the rest is counted.

    Args:
        old: Fingerprint kept in a store.
        new: Fingerprint of the problem at hand.

    >>> differences({"dtype": "float64", "loss": "mse"}, {"dtype": "float32", "loss": "mse"})
    ["dtype is 'float32', the store has 'float64'"]
    """
    found: list[str] = []
    _compare("", old, new, found)
    if len(found) > _MOST:
        found = [*found[:_MOST], f"and {len(found) - _MOST} more differences"]
    return found


def _compare(place: str, old: Any, new: Any, found: list[str]) -> None:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        before, now = ({str(key): value for key, value in side.items()} for side in (old, new))
        for key in sorted({*before, *now}):
            where = f"{place}: {key}" if place else key
            if key not in now:
                found.append(f"{where} is in the store ({_short(before[key])}) and not in this problem")
            elif key not in before:
                found.append(f"{where} is in this problem ({_short(now[key])}) and not in the store")
            else:
                _compare(where, before[key], now[key], found)
    elif _is_sequence(old) and _is_sequence(new):
        _compare_sequences(place, list(old), list(new), found)
    elif old != new or isinstance(old, bool) != isinstance(new, bool):
        found.append(f"{place} is {_short(new)}, the store has {_short(old)}")


def _compare_sequences(place: str, old: list[Any], new: list[Any], found: list[str]) -> None:
    nested = any(isinstance(entry, Mapping) or _is_sequence(entry) for entry in (*old, *new))
    if nested or (len(old) == len(new) and len(old) > 4):
        if len(old) != len(new):
            found.append(f"{place} has {len(new)} entries, the store has {len(old)}")
        for index, (left, right) in enumerate(zip(old, new)):
            _compare(f"{place}[{index}]", left, right, found)
    elif old != new:
        found.append(f"{place} is {_short(new)}, the store has {_short(old)}")


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
