"""Reads fields of JSON that nobody vouches for: types and bounds first, and a sentence that says where something is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOST_INTEGER = 2**63 - 1
"""Largest whole number that any field holds."""


def read_field(value: Any, key: str, where: str = "") -> Any:
    """The value under a key.

    Args:
        value: What should be a mapping.
        key: In it.
        where: What messages call the mapping; nothing for the outermost.

    Raises:
        ValueError: It is no mapping, or has no such key.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{where or f'what should hold {key}'} is {said(value)}, not a mapping")
    if key not in value:
        raise ValueError(f"{where}.{key} is missing" if where else f"{key} is missing")
    return value[key]


def read_entries(value: Any, where: str) -> list[Any]:
    """The value, which is a list.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(value, list):
        raise ValueError(f"{where} is {said(value)}, not a list")
    return value


def read_text(value: Any, where: str) -> str:
    """The value, which is a text.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(value, str):
        raise ValueError(f"{where} is {said(value)}, not a text")
    return value


def read_whole(value: Any, where: str, most: int = MOST_INTEGER, least: int = 0) -> int:
    """The value, which is a whole number within bounds.

    Raises:
        ValueError: It is none, or out of bounds.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{where} is {said(value)}, not a whole number from {least} to {most:,}")
    return value


def said(value: Any) -> str:
    """A value as messages show it: in short, whatever it is.

    >>> said([0] * 99), said(10**400), said("a" * 99)[-6:]
    ('a list of 99 entries', 'a number of more than 60 digits', 'aaa...')
    """
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of more than 60 digits"
    if isinstance(value, (list, Mapping)) and len(value) > 8:
        return f"a {'list' if isinstance(value, list) else 'mapping'} of {len(value)} entries"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
